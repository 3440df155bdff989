"""What adapters take apart adds up to what the backbone itself computes."""

import pytest
import torch

from amvl_fast import AMVLError

from .families import CONFIGS, IMAGE, make_batch, make_model


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_an_adapter_says_what_its_backbone_says(family, side):
    """Embeddings, positions, masks and the decoder on their own, beside the whole model, images included."""
    model = make_model(family)
    adapter, batch = model.adapter, make_batch(model, family, side=side)
    del batch["labels"]
    mask = batch["attention_mask"]
    if family.startswith("qwen"):
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).int()
    vision = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        embedded = adapter.embed(batch["input_ids"], **vision)
        positions = adapter.positions(batch["input_ids"], mask, **vision)
        got = adapter.head(adapter.decode(embedded.embeds, mask, positions, embedded.extras))
        # Other families count positions from the mask in generate() alone.
        own = {} if family.startswith("qwen") else {"position_ids": positions[0]}
        right = model.backbone(**batch, **own).logits
    rows = mask.bool()
    torch.testing.assert_close(got[rows], right[rows], rtol=1e-9, atol=1e-9)


def test_images_change_what_is_said():
    """Each family's images reach its decoder; otherwise the test above could compare nothing with nothing."""
    for family in CONFIGS:
        model = make_model(family)
        batch = make_batch(model, family)
        other = batch | {"pixel_values": batch["pixel_values"].flip(-1)}
        with torch.no_grad():
            assert (model(**batch, seed=1).prior_mean - model(**other, seed=1).prior_mean)[0].abs().max() > 1e-6, family


@pytest.mark.parametrize("family", list(CONFIGS))
def test_features_stand_in_place_of_pixels(family):
    """Those of a whole batch to the last bit, and those of its samples, each encoded on its own."""
    model = make_model(family)
    batch = make_batch(model, family)
    vision = {name: batch[name] for name in model.adapter.VISION_INPUTS if name in batch}
    rest = {name: value for name, value in batch.items() if name != "pixel_values"}
    with torch.no_grad():
        features = model.adapter.encode_images(**vision)
        expected, got = model(**batch, seed=1), model(**rest, image_features=features, seed=1)
        other = {name: value.flip(0) for name, value in features.items()}
        assert model(**rest, image_features=other, seed=1).loss != expected.loss
    assert torch.equal(got.loss, expected.loss) and torch.equal(got.z, expected.z)
    assert all(len(value) == (batch["input_ids"] == IMAGE).sum() for value in features.values())


def test_features_are_as_many_as_their_tokens_and_come_alone():
    model = make_model("qwen2_5_vl")
    batch = make_batch(model, "qwen2_5_vl")
    features = {"embeds": torch.zeros(int((batch["input_ids"] == IMAGE).sum()), 32, dtype=torch.float64)}
    with pytest.raises(AMVLError, match="in place of pixel_values"):
        model(**batch, image_features=features)
    del batch["pixel_values"]
    with pytest.raises(AMVLError, match="but image_features hold 1 features"):
        model(**batch, image_features={"embeds": features["embeds"][:1]})
    with pytest.raises(AMVLError, match=r"image_features\['embeds'\] holds NaN"):
        model(**batch, image_features={"embeds": features["embeds"] + float("nan")})
    del batch["image_grid_thw"]
    with pytest.raises(AMVLError, match="image_features and image_grid_thw go together"):
        model(**batch, image_features=features)


@pytest.mark.parametrize("family", list(CONFIGS))
def test_a_frozen_tower_makes_no_graph(family):
    """Even if its embeddings are made to require gradients, as for checkpointing, and the connector is trained."""
    model = make_model(family)
    batch, outputs = make_batch(model, family), []
    model.backbone.enable_input_require_grads()
    model.adapter.vision_tower.register_forward_hook(lambda tower, args, output: outputs.append(output))
    model(**batch, seed=1).loss.backward()
    [output] = outputs
    assert output.last_hidden_state.grad_fn is None
    tower = {id(parameter) for parameter in model.adapter.vision_tower.parameters()}
    connector = {n: p for n, p in model.adapter.vision_parameters().items() if id(p) not in tower}
    assert all(p.grad is not None for p in connector.values()) and bool(connector) != family.startswith("qwen")
