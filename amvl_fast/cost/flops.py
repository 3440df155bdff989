"""Floating-point operations of a training step: matrix products alone, a multiplication and an addition being two.

A linear map costs 2 operations a weight and row forward, 2 for the gradient of its input and 2 for that of its weight
(Kaplan et al. 2020, arXiv 2001.08361). Attention costs 4 forward for each pair of query and key and each dimension of
each head, and 8 backward; kernels that make the scores again there, 10 (Dao et al. 2022, arXiv 2205.14135).
"""

from __future__ import annotations

from dataclasses import dataclass

from amvl_fast.cost.sizes import Decoder, Sizes
from amvl_fast.cost.vision import Vision

SHARED_PREFIX, THREE_PASS = EXECUTIONS = "shared_prefix", "three_pass"


@dataclass(frozen=True)
class Sample:
    """Lengths of one sample: rows of the prompt, image tokens included, and of the answer. Means may be fractions."""

    prompt: float
    answer: float
    image_tokens: float = 0
    images: float = 1


@dataclass(frozen=True)
class Recipe:
    """How a step is run.

    Attributes:
        execution: of `EXECUTIONS`.
        decoded: how often the answer is decoded: samples of the posterior, and one of the prior if it is asked for.
        checkpointing: whether decoder layers run again in the backward pass.
        lora_rank: of LoRA on all linear maps of the decoder's layers, all else but the latents frozen; 0 for none.
        freeze: parts that are not trained, see `amvl_fast.training.parts.PARTS`.
        attention: as `attn_implementation`; see `pairs`.
    """

    execution: str = SHARED_PREFIX
    decoded: int = 1
    checkpointing: bool = False
    lora_rank: int = 0
    freeze: tuple[str, ...] = ("vision_tower",)
    attention: str = "sdpa"

    def trains(self, part: str) -> bool:
        """Whether the weights of ``"language_model"``, ``"connector"`` or ``"vision_tower"`` get gradients."""
        return not self.lora_rank and part not in self.freeze

    @property
    def trains_images(self) -> bool:
        """Whether the gradients of image tokens are asked for."""
        return self.trains("connector") or self.trains("vision_tower")

    @property
    def trains_prompts(self) -> bool:
        """Whether a prompt's embeddings get gradients; transformers makes them require some for checkpointing."""
        return self.trains("language_model") or self.trains_images or self.checkpointing


@dataclass(frozen=True)
class Flops:
    """Operations of the forward pass, of the backward pass, and of what the latter computes anew."""

    forward: float = 0
    backward: float = 0
    recompute: float = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recompute + other.recompute)

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.recompute


@dataclass(frozen=True)
class Call:
    """One call of the decoder, for one sample.

    Attributes:
        before: rows whose keys and values are there already.
        branches: rows of each branch, blind to one another.
        is_read: False where nobody reads the final hidden states, but only keys and values.
    """

    before: float
    branches: tuple[float, ...]
    is_read: bool = True

    @property
    def rows(self) -> float:
        return sum(self.branches)

    @property
    def keys(self) -> float:
        return self.before + self.rows

    @property
    def pairs(self) -> float:
        """Queries and the keys they may read; of the own rows each reads half on average."""
        return sum(rows * (self.before + rows / 2) for rows in self.branches)

    @property
    def is_masked(self) -> bool:
        """Whether it takes an explicit mask: branches do, where a whole causal sequence needs none."""
        return self.before > 0


def pairs(call: Call, attention: str) -> float:
    """Queries and keys that a kernel multiplies: what may be read if it skips the rest, else the whole rectangle.

    Flash attention skips; so does PyTorch's own (`sdpa`) for causal sequences, but not under an explicit mask; eager
    attention multiplies everything and masks it then.
    """
    whole = attention.endswith("eager") or (attention == "sdpa" and call.is_masked)
    return call.rows * call.keys if whole else call.pairs


def calls(k: int, end: int, sample: Sample, recipe: Recipe) -> list[Call]:
    """What a step calls the decoder for, with `k` latents and `end` rows of end-of-latents."""
    x, y = sample.prompt, sample.answer
    decode = k + end + y
    if recipe.execution == THREE_PASS:
        return [Call(0, (x + k,)), Call(0, (x + y + k,)), *[Call(0, (x + decode,))] * recipe.decoded]
    return [Call(0, (x,), is_read=False), Call(x, (k, y + k)), Call(x, (decode,) * recipe.decoded)]


def linear_flops(decoder: Decoder, call: Call, recipe: Recipe) -> Flops:
    """Of all linear maps but the head. Where the final states are not read, the last layer trains keys and values."""
    if not (call.is_read or recipe.lora_rank or recipe.trains_prompts):
        return Flops(2 * call.rows * decoder.layers * decoder.layer_weights)
    layers, layer, lora = decoder.layers, decoder.layer_weights, recipe.lora_rank * decoder.lora_widths
    kv_lora = 2 * recipe.lora_rank * (decoder.hidden + decoder.kv_width)
    unread = 0 if call.is_read else layer - decoder.kv_weights
    unread_lora = 0 if call.is_read else lora - kv_lora
    used, used_lora = layers * layer - unread, layers * lora - unread_lora
    if recipe.trains("language_model"):
        backward = 4 * used
    else:
        asked = call.is_read or recipe.trains_prompts  # for the gradient of the first layer's input
        first = decoder.hidden * (decoder.query_width + 2 * decoder.kv_width + 3 * recipe.lora_rank)
        backward = 2 * used + 4 * used_lora - (0 if asked else 2 * first)
    # Running a layer again ends at the last tensor that is kept: before its last product.
    last = recipe.lora_rank * decoder.hidden if recipe.lora_rank else decoder.down_weights
    again = recipe.checkpointing * (layer + lora - last)
    rows = call.rows
    return Flops(2 * rows * layers * (layer + lora), rows * backward, 2 * rows * layers * again)


def attention_flops(decoder: Decoder, call: Call, recipe: Recipe) -> Flops:
    """Of scores and of the values they weigh."""
    layer = 4 * pairs(call, recipe.attention) * decoder.query_width
    if not (call.is_read or recipe.lora_rank or recipe.trains_prompts):
        return Flops(layer * decoder.layers)
    trained = decoder.layers if call.is_read else decoder.layers - 1
    backward = 2 if recipe.attention.endswith("eager") else 2.5
    return Flops(layer * decoder.layers, backward * layer * trained, recipe.checkpointing * layer * decoder.layers)


def head_flops(decoder: Decoder, sample: Sample, recipe: Recipe) -> Flops:
    """Logits of answers alone; `amvl_fast.answers` makes them again going backward, three passes keep them."""
    forward = 2 * decoder.head_weights * sample.answer * recipe.decoded
    return Flops(forward, (1 + recipe.trains("language_model")) * forward, (recipe.execution != THREE_PASS) * forward)


def latent_flops(sizes: Sizes, recipe: Recipe) -> Flops:
    """Two heads with mean and log-variance each, and the projection of each sample."""
    forward = 2 * sizes.k * sizes.d * sizes.decoder.hidden * (4 + recipe.decoded)
    return Flops(forward, 2 * forward)


def vision_flops(vision: Vision, sample: Sample, recipe: Recipe) -> Flops:
    """Of the tower; forward alone where it is frozen."""
    patches = sample.image_tokens * vision.patches_per_token
    if not patches:
        return Flops()
    # Images of one size; windows that the image's border cuts are counted whole.
    read = vision.full_layers * patches / sample.images + (vision.layers - vision.full_layers) * vision.window
    blocks = 2 * patches * vision.patch_weights + 4 * patches * read * vision.hidden
    embedding = 2 * patches * vision.embedding_weights
    forward = embedding + blocks + 2 * sample.image_tokens * vision.token_weights
    if not recipe.trains("vision_tower"):
        return Flops(forward)
    # Again a layer's last product is not made anew.
    again = blocks - 2 * patches * vision.layers * vision.hidden * vision.intermediate
    return Flops(forward, 2 * forward - embedding, recipe.checkpointing * again)


def connector_flops(vision: Vision, sample: Sample, recipe: Recipe) -> Flops:
    """Of what stands between tower and decoder. Behind a frozen tower its input needs no gradient."""
    forward = 2 * sample.image_tokens * vision.connector_weights
    trains, passes_on = recipe.trains("connector"), recipe.trains("vision_tower")
    first = 2 * sample.image_tokens * vision.connector_first
    return Flops(forward, trains * forward + (forward if passes_on else trains * (forward - first)))


def step_flops(sizes: Sizes, sample: Sample, recipe: Recipe) -> dict[str, Flops]:
    """Of one sample's forward and backward pass, by part; the optimiser's arithmetic is left out."""
    made = calls(sizes.k, sizes.end, sample, recipe)
    return {
        "vision tower": vision_flops(sizes.vision, sample, recipe),
        "connector": connector_flops(sizes.vision, sample, recipe),
        "decoder, linear maps": sum((linear_flops(sizes.decoder, call, recipe) for call in made), Flops()),
        "decoder, attention": sum((attention_flops(sizes.decoder, call, recipe) for call in made), Flops()),
        "logits": head_flops(sizes.decoder, sample, recipe),
        "latents": latent_flops(sizes, recipe),
    }


def training_flops(
    sizes: Sizes,
    *,
    samples: int,
    prompt_tokens: int,
    answer_tokens: int,
    image_tokens: int = 0,
    images: int = 0,
    execution: str = SHARED_PREFIX,
    decoded: int = 1,
    lora_rank: int = 0,
    freeze: tuple[str, ...] = ("vision_tower",),
) -> float:
    """Model operations of a batch, for the model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311, app. B).

    What is computed again in the backward pass does not count, and of attention only the pairs that may be read, with
    8 operations backward; PaLM counts the whole square, so that our utilisation is the lower one. Operations of a batch
    are those of its mean sample: attention, the only part that is not linear in lengths, comes out a little low.

    Args:
        samples: in the batch.
        prompt_tokens, answer_tokens, image_tokens, images: sums over the batch; image tokens are prompt tokens, too.
        execution, decoded, lora_rank, freeze: see `Recipe`.
    """
    sample = Sample(prompt_tokens / samples, answer_tokens / samples, image_tokens / samples, max(images, 1) / samples)
    recipe = Recipe(execution, decoded, lora_rank=lora_rank, freeze=tuple(freeze), attention="flash")
    parts = step_flops(sizes, sample, recipe)
    attention = parts.pop("decoder, attention").forward
    unread = sum(
        4 * c.pairs * sizes.decoder.query_width for c in calls(sizes.k, sizes.end, sample, recipe) if not c.is_read
    )
    return samples * (3 * attention - 2 * unread + sum(part.forward + part.backward for part in parts.values()))
