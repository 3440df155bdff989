"""What adapters take apart adds up to what the backbone itself computes."""

import pytest
import torch

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
