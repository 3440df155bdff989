"""Memory of one GPU, by part."""

from __future__ import annotations

from amvl_fast.answers import CHUNK
from amvl_fast.cost.activations import FLOAT32, Precision, activation_bytes, cast_bytes, layer_bytes
from amvl_fast.cost.engines import Setup, state_bytes
from amvl_fast.cost.flops import THREE_PASS, Recipe, Sample, calls
from amvl_fast.cost.sizes import Sizes
from amvl_fast.cost.vision import Vision

# Of a GPU's memory; the rest is left to CUDA, to communication and to what the allocator cannot use.
USABLE = 0.92


def memory_bytes(sizes: Sizes, sample: Sample, recipe: Recipe, setup: Setup) -> dict[str, float]:
    """Bytes on each GPU when a backward pass begins, by part.

    Args:
        sample: the lengths that each sample of a micro-batch is padded to.
    """
    precision = setup.precision(recipe)
    kept = activation_bytes(sizes, sample, recipe, precision)
    return {
        **state_bytes(sizes, recipe, setup),
        "cast weights": cast_bytes(sizes, sample, recipe, precision),
        **{name: setup.batch * of_sample for name, of_sample in kept.items()},
        "vision tower": setup.batch * vision_bytes(sizes.vision, sample, recipe, precision),
        "work space": work_bytes(sizes, sample, recipe, setup),
    }


def vision_bytes(vision: Vision, sample: Sample, recipe: Recipe, precision: Precision) -> float:
    """Of one sample's images: one block's if frozen, else what all keep (checkpointed, their inputs)."""
    patches = sample.image_tokens * vision.patches_per_token
    block = patches * precision.compute * (8 * vision.hidden + 4 * vision.intermediate)
    if not recipe.trains("vision_tower"):
        return block
    return (
        patches * precision.compute * vision.hidden * vision.layers if recipe.checkpointing else vision.layers * block
    )


def work_bytes(sizes: Sizes, sample: Sample, recipe: Recipe, setup: Setup) -> float:
    """The most that is needed at a time besides what is kept: for a chunk of logits, or for one layer.

    A chunk's logits come in the dtype of linear maps, in float32, as their logarithms and as gradients. A layer takes
    the gradients of its widest parts, and, checkpointed, what it keeps. A weight's gradient is made before it is added.
    """
    decoder, precision = sizes.decoder, setup.precision(recipe)
    rows = setup.batch * sample.answer * recipe.decoded
    if recipe.execution == THREE_PASS:  # each sample's logits by themselves
        rows = sample.answer
    numbers = rows * decoder.vocabulary if recipe.execution == THREE_PASS else min(CHUNK, rows * decoder.vocabulary)
    logits = numbers * (precision.compute + 3 * FLOAT32)
    if recipe.trains("language_model"):
        logits += decoder.head_weights * precision.weights
    largest = max(calls(sizes.k, sizes.end, sample, recipe), key=lambda call: call.rows)
    layer = largest.rows * (3 * precision.compute * decoder.intermediate + 2 * precision.stream * decoder.hidden)
    if recipe.checkpointing:
        layer += layer_bytes(decoder, largest, recipe, precision)
    return max(logits, setup.batch * layer)
