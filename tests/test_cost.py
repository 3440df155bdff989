"""Sizes and operations that are predicted, against those that PyTorch counts on tiny models."""

from dataclasses import replace

import pytest
import torch
from cost_models import BATCH, CHECKPOINTING, EXECUTIONS, LATENTS, build
from model.families import CONFIGS, IMAGE, vision_inputs
from torch.utils.flop_counter import FlopCounterMode

from amvl_fast.cost import Recipe, Sample, sizes_of, step_flops, training_flops
from amvl_fast.cost.flops import Call, pairs
from amvl_fast.cost.sizes import Decoder
from amvl_fast.errors import AMVLError

ANSWER = 6


def batch_of(model, family, prompt=60, images=True):
    """Equal lengths, an image each. Also how many tokens an image takes."""
    torch.manual_seed(0)
    vision = vision_inputs(family, (1,) * BATCH, torch.float32) if images else {}
    if images and family.startswith("qwen"):  # whole windows
        grid = torch.tensor([[1, 8, 8]] * BATCH)
        vision = {"pixel_values": torch.randn(BATCH * 64, 96), "image_grid_thw": grid}
    tokens = 0
    if images:
        features = torch.cat([f.flatten(0, -2) for f in model.adapter.image_features(**vision).pooler_output])
        tokens = len(features) // BATCH
    ids = torch.randint(3, 50, (BATCH, prompt + ANSWER))
    ids[:, 1 : 1 + tokens] = IMAGE
    labels = ids.masked_fill(torch.arange(prompt + ANSWER) < prompt, -100)
    batch = {"input_ids": ids, "labels": labels, **vision}
    return (batch | {"token_type_ids": (ids == IMAGE).int()} if family == "gemma3" else batch), tokens


# Sizes


@pytest.mark.parametrize("family", CONFIGS)
def test_parameters_are_counted_without_making_them(family):
    model = build(CONFIGS[family]())
    parameters = sizes_of(CONFIGS[family](), LATENTS).parameters
    assert parameters.total == sum(p.numel() for p in model.parameters())
    assert parameters.vision == sum(p.numel() for p in model.adapter.vision_tower.parameters())
    assert parameters.latents == sum(p.numel() for p in model.latents.parameters())


def test_unknown_layers_are_refused(monkeypatch):
    monkeypatch.setattr(Decoder, "layer_weights", 1)
    with pytest.raises(AMVLError, match="cost of LlamaModel is not known"):
        sizes_of(CONFIGS["llava"](), LATENTS)


# Operations


def counted(model, batch, checkpointing, **options):
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTING)
    with FlopCounterMode(display=False) as counter:
        model(**batch, **options).loss.backward()
    return counter.get_total_flops()


# Eager attention, whose products of matrices are counted one by one, over the whole rectangle of queries and keys.
OPTIONS = [
    Recipe(),
    Recipe(checkpointing=True),
    Recipe(lora_rank=2),
    Recipe(lora_rank=2, checkpointing=True),
    Recipe(freeze=(), checkpointing=True),
    Recipe(decoded=4),
    Recipe(freeze=("vision_tower", "connector", "language_model")),
]
# Exact, but for LLaVA's class token, and the layers of its frozen tower that checkpointing makes run backward.
CHECKS = [("qwen2_5_vl", one, 1e-12) for one in OPTIONS] + [("llava", one, 0.025) for one in OPTIONS[:5]]


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("family, recipe, tolerance", CHECKS, ids=range(len(CHECKS)))
def test_operations_are_those_that_are_counted(family, recipe, tolerance, execution):
    model = build(CONFIGS[family](), recipe.lora_rank, "vision_tower" in recipe.freeze, attn_implementation="eager")
    if "language_model" in recipe.freeze:
        model.backbone.requires_grad_(False)
    batch, tokens = batch_of(model, family)
    # Of four decoded samples one is the prior's.
    options = dict(num_posterior_samples=3, prior_ntp_weight=1.0) if recipe.decoded == 4 else {}
    got = counted(model, batch, recipe.checkpointing, execution=execution, **options)
    recipe = replace(recipe, execution=execution, attention="eager")
    parts = step_flops(sizes_of(CONFIGS[family](), LATENTS), Sample(60, ANSWER, tokens), recipe)
    assert BATCH * sum(part.total for part in parts.values()) == pytest.approx(got, rel=tolerance)


@pytest.mark.parametrize(
    "family", sorted(set(CONFIGS) - {"llava", "llava_onevision", "qwen2_5_vl"})
)  # whose images are cut into tiles
def test_every_family_is_near(family):
    model = build(CONFIGS[family](), attn_implementation="eager")
    batch, tokens = batch_of(model, family)
    parts = step_flops(sizes_of(CONFIGS[family](), LATENTS), Sample(60, ANSWER, tokens), Recipe(attention="eager"))
    assert BATCH * sum(part.total for part in parts.values()) == pytest.approx(counted(model, batch, False), rel=0.005)


def test_kernels_skip_what_may_not_be_read_or_do_not():
    causal, branches = Call(0, (10,)), Call(7, (2, 4))
    assert causal.pairs == 50 and branches.pairs == 2 * 8 + 4 * 9
    assert [pairs(causal, name) for name in ("eager", "sdpa", "flash_attention_2")] == [100, 50, 50]
    assert [pairs(branches, name) for name in ("eager", "sdpa", "flash_attention_2")] == [78, 78, 52]


def test_model_operations_leave_out_what_is_computed_again():
    sizes = sizes_of(CONFIGS["qwen2_5_vl"](), LATENTS)
    decoder = sizes.decoder
    sums = dict(samples=4, prompt_tokens=400, answer_tokens=40)
    got = training_flops(sizes, execution="three_pass", **sums)
    rows = [100 + 3, 100 + 10 + 3, 100 + 3 + 1 + 10]
    linear = 6 * sum(rows) * decoder.layers * decoder.layer_weights + 6 * 10 * decoder.head_weights
    attention = 12 * sum(n * n / 2 for n in rows) * decoder.layers * decoder.query_width
    assert got == 4 * (linear + attention + 6 * 3 * 5 * decoder.hidden * 5)
    shared = training_flops(sizes, **sums)
    flash = Recipe(attention="flash")
    parts = step_flops(sizes, Sample(100, 10), flash)
    assert shared < 4 * sum(part.forward + part.backward for part in parts.values()) < got
    assert training_flops(sizes, **{name: 2 * value for name, value in sums.items()}) == 2 * shared
    assert training_flops(sizes, lora_rank=2, **sums) < shared < training_flops(sizes, image_tokens=40, **sums)
