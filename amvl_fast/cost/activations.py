"""What the forward pass keeps for the backward pass, in bytes.

Derived from what PyTorch's operators keep in the decoder layers of Qwen2.5-VL, Qwen2 and Llama as transformers has
them: RMS norms that compute in float32, rotary embeddings, attention, and a gated MLP.
"""

from __future__ import annotations

from typing import NamedTuple

from amvl_fast.cost.flops import SHARED_PREFIX, THREE_PASS, Call, Recipe, Sample, calls
from amvl_fast.cost.sizes import Decoder, Sizes

FLOAT32, INT64 = 4, 8


class Precision(NamedTuple):
    """Bytes of a number: of the weights, of the residual stream, and of what linear maps give.

    `autocast` has linear maps cast weights and inputs themselves, each its own copy of its input; weights are cast once
    if they are trained, and otherwise at each call.
    """

    weights: int
    stream: int
    compute: int
    autocast: bool


SINGLE = Precision(4, 4, 4, False)
MIXED = Precision(4, 4, 2, True)
HALF = Precision(2, 2, 2, False)
HALF_AUTOCAST = Precision(2, 2, 2, True)


def norm_bytes(decoder: Decoder, recipe: Recipe, precision: Precision) -> int:
    """Of one row of an RMS norm: its input and the reciprocal root in float32, and for its gain the normalised row."""
    return FLOAT32 * (decoder.hidden + 1) + recipe.trains("language_model") * precision.stream * decoder.hidden


def input_bytes(maps: int, decoder: Decoder, recipe: Recipe, precision: Precision) -> int:
    """Of one row that `maps` linear maps read; under autocast each keeps its own copy, else all keep the same."""
    if not (recipe.lora_rank or recipe.trains("language_model")):
        return 0  # frozen maps need their input for nothing
    copies = precision.autocast and (precision.stream > precision.compute or recipe.lora_rank > 0)
    return decoder.hidden * (maps * precision.compute if copies else precision.stream)


def attention_bytes(decoder: Decoder, call: Call, recipe: Recipe, precision: Precision) -> float:
    """Of one layer: queries, keys, values, output and logarithms of sums."""
    own = call.rows * (2 * decoder.query_width * precision.compute + FLOAT32 * decoder.heads)
    if recipe.attention.endswith("eager"):
        scores = call.rows * call.keys * decoder.heads * (FLOAT32 + (precision.compute < FLOAT32) * precision.compute)
        return own + scores + 2 * precision.compute * decoder.query_width * call.keys
    if recipe.attention != "sdpa":  # flash attention: each branch with its own copy of its prompt's
        keys = sum(call.before + rows for rows in call.branches)
        return own + 2 * precision.compute * decoder.kv_width * keys
    # transformers repeats keys and values for each query head where there is a mask.
    width = decoder.query_width if call.is_masked else decoder.kv_width
    return own + 2 * precision.compute * width * call.keys


def layer_bytes(decoder: Decoder, call: Call, recipe: Recipe, precision: Precision) -> float:
    """Of one layer, for one sample."""
    row = 2 * norm_bytes(decoder, recipe, precision)
    row += input_bytes(3, decoder, recipe, precision) + input_bytes(2, decoder, recipe, precision)
    # Gate, its activation, what it multiplies, and the product, which frozen maps do not keep.
    kept = 3 + bool(recipe.lora_rank or recipe.trains("language_model"))
    row += kept * precision.compute * decoder.intermediate
    if recipe.lora_rank:
        row += 7 * precision.compute * recipe.lora_rank
        row += precision.autocast * precision.compute * decoder.query_width
    return call.rows * row + attention_bytes(decoder, call, recipe, precision)


def call_bytes(decoder: Decoder, call: Call, recipe: Recipe, precision: Precision) -> float:
    """Of all layers, for one sample, and what they share: rotary embeddings and masks."""
    if not (call.is_read or recipe.lora_rank or recipe.trains_prompts):
        return 0
    shared = call.rows * 2 * decoder.head_dim * precision.stream
    if call.is_masked and recipe.attention in ("sdpa", "eager"):
        # Made for the stream's dtype; where attention has another, each layer keeps its own copy.
        casts = precision.stream > precision.compute and not recipe.checkpointing
        shared += call.rows * call.keys * (decoder.layers * precision.compute if casts else precision.stream)
    if recipe.checkpointing:
        return shared + decoder.layers * call.rows * decoder.hidden * precision.stream
    layer = layer_bytes(decoder, call, recipe, precision)
    if call.is_read:
        return shared + decoder.layers * layer
    # Of the last layer keys and values alone are used, and what led to the rest is freed.
    last = norm_bytes(decoder, recipe, precision) + input_bytes(2, decoder, recipe, precision)
    last += 2 * precision.compute * recipe.lora_rank
    # Where nothing before the first layer is trained, it keeps nothing of its first norm.
    first = 0 if recipe.trains_prompts else norm_bytes(decoder, recipe, precision)
    return shared + (decoder.layers - 1) * layer + call.rows * (last - first)


def prompt_key_bytes(decoder: Decoder, sample: Sample, precision: Precision = HALF) -> float:
    """Keys and values of one sample's prompt; rotating keys gives the residual stream's dtype."""
    return (precision.stream + precision.compute) * decoder.layers * decoder.kv_width * sample.prompt


def ends_bytes(sizes: Sizes, sample: Sample, recipe: Recipe, precision: Precision) -> float:
    """Of one sample's last norms, and of the final states that heads and logits read."""
    decoder = sizes.decoder
    made = calls(sizes.k, sizes.end, sample, recipe)
    kept = sum(call.rows for call in made if call.is_read) * norm_bytes(decoder, recipe, precision)
    hidden = decoder.hidden
    answers = sample.answer * recipe.decoded * hidden
    whole = precision.stream == FLOAT32  # a view that is kept keeps all rows
    if recipe.execution == THREE_PASS:
        kept += 2 * sizes.k * hidden * FLOAT32
        decoded = sum(call.rows for call in made[2:]) * hidden
        return kept + (answers * precision.compute if precision.autocast else decoded * precision.stream)
    if recipe.trains_prompts:
        # Answers are taken from the embeddings of prompt and answer, twice, by an index for each of their numbers.
        kept += (sample.prompt + sample.answer) * hidden * precision.stream + 2 * INT64 * sample.answer * hidden
    return kept + (made[1].rows if whole else 2 * sizes.k) * hidden * FLOAT32 + answers * precision.stream


def latent_bytes(sizes: Sizes, recipe: Recipe) -> int:
    """Of one sample's latents, in float32: both Gaussians, samples, embeddings and their norm.

    The fused op keeps its inputs alone; three passes take the plain one, which keeps some 25 numbers for each KL.
    """
    plain = 50 if recipe.execution == THREE_PASS else 0
    return FLOAT32 * sizes.k * (sizes.d * (8 + plain + 2 * recipe.decoded) + 2 * recipe.decoded * sizes.decoder.hidden)


def activation_bytes(sizes: Sizes, sample: Sample, recipe: Recipe, precision: Precision) -> dict[str, float]:
    """Of one sample, by part, at the end of the forward pass; weights that autocast casts left out."""
    decoder = sizes.decoder
    made = calls(sizes.k, sizes.end, sample, recipe)
    logits = sample.answer * recipe.decoded * decoder.vocabulary * FLOAT32
    if casts_frozen(recipe, precision):
        logits += recipe.decoded * decoder.head_weights * precision.compute
    # Where layers keep nothing, branches still need their prompt's keys and values; else these count with the layers.
    keys = recipe.execution == SHARED_PREFIX and recipe.checkpointing
    return {
        "prompt keys and values": prompt_key_bytes(decoder, sample, precision) if keys else 0,
        "decoder layers": sum(call_bytes(decoder, call, recipe, precision) for call in made),
        "final states": ends_bytes(sizes, sample, recipe, precision) + latent_bytes(sizes, recipe),
        "logits": logits if recipe.execution == THREE_PASS else 0,
    }


def casts_frozen(recipe: Recipe, precision: Precision) -> bool:
    """Whether autocast casts frozen weights, which it does at each use: its cache holds trained ones alone."""
    return precision.autocast and precision.weights > precision.compute and not recipe.trains("language_model")


def cast_bytes(sizes: Sizes, sample: Sample, recipe: Recipe, precision: Precision) -> int:
    """Of weights that are cast: the Gaussian heads' to float32; under autocast the decoder's, in its cache or graph."""
    decoder = sizes.decoder
    if precision.weights < FLOAT32:
        return 4 * FLOAT32 * sizes.d * decoder.hidden
    if not precision.autocast:
        return 0
    layers = decoder.layers * decoder.layer_weights
    if recipe.trains("language_model"):
        return precision.compute * (layers + decoder.head_weights)
    if recipe.checkpointing or not casts_frozen(recipe, precision):
        return 0
    kept = 0
    for call in calls(sizes.k, sizes.end, sample, recipe):
        kept += layers
        if not call.is_read:  # the last layer's keys and values, and of the first layer what comes after them
            kept -= decoder.layer_weights - decoder.kv_weights
            kept -= (not recipe.trains_prompts) * (decoder.hidden * decoder.query_width + decoder.kv_weights)
    return precision.compute * kept
