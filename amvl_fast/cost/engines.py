"""How a run's state is spread over GPUs, and what they send each other."""

from __future__ import annotations

from dataclasses import dataclass

from amvl_fast.cost.activations import HALF, HALF_AUTOCAST, MIXED, SINGLE, Precision
from amvl_fast.cost.flops import Recipe
from amvl_fast.cost.gpus import GPU, NODE
from amvl_fast.cost.sizes import Sizes
from amvl_fast.errors import AMVLError

ENGINES = ("single", "ddp", "fsdp2", "zero2", "zero3")
SHARDED = ("fsdp2", "zero3")
FLOAT32 = 4
# DeepSpeed's reduce_bucket_size.
BUCKET = 200_000_000
LINK_SHARE = 0.7  # of a link's published bandwidth that collectives reach


@dataclass(frozen=True)
class Setup:
    """What a run's memory and traffic depend on besides the model.

    Attributes:
        engine: of `ENGINES`.
        count: GPUs.
        batch: samples of a micro-batch on one GPU.
        accumulation: micro-batches of an optimiser's step.
        weights: bytes of a weight as it is loaded.
        bf16: whether linear maps compute in bfloat16 whatever the weights are.
        sync_each_batch: whether fsdp2 shards gradients after each micro-batch and not only after the last.

    Raises:
        AMVLError: the engine is not known, or does not go with the number of GPUs.
    """

    engine: str
    count: int
    batch: int
    accumulation: int
    weights: int
    bf16: bool
    sync_each_batch: bool = False

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise AMVLError(f"The engine {self.engine!r} is not known; use one of: {', '.join(ENGINES)}.")
        if self.count < 1:
            raise AMVLError(f"The number of GPUs is {self.count}; it must be at least 1.")
        if self.engine == "single" and self.count > 1:
            raise AMVLError(f"The engine 'single' runs on one GPU, not on {self.count}; use one of: {ENGINES[1:]}.")

    @property
    def is_deepspeed(self) -> bool:
        return self.engine.startswith("zero")

    @property
    def keeps_gradients(self) -> bool:
        """Whether each GPU keeps whole gradients until the last micro-batch, which Trainer has fsdp2 do."""
        return self.engine == "fsdp2" and self.accumulation > 1 and self.count > 1 and not self.sync_each_batch

    def precision(self, recipe: Recipe) -> Precision:
        """What layers compute in: sharding engines cast weights when they gather them, others leave it to autocast."""
        if self.bf16 and (self.engine == "fsdp2" or self.is_deepspeed):
            return HALF
        if self.weights == FLOAT32:
            return MIXED if self.bf16 else SINGLE
        return HALF_AUTOCAST if self.bf16 and recipe.lora_rank else HALF


def trained_parameters(sizes: Sizes, recipe: Recipe) -> int:
    """Of LoRA and latents, or of all that is not frozen."""
    parameters = sizes.parameters
    if recipe.lora_rank:
        return parameters.latents + sizes.decoder.layers * recipe.lora_rank * sizes.decoder.lora_widths
    language_model = parameters.layers + parameters.embeddings + parameters.rest
    trained = recipe.trains("language_model") * language_model + ("latents" not in recipe.freeze) * parameters.latents
    return (
        trained + recipe.trains("connector") * parameters.connector + recipe.trains("vision_tower") * parameters.vision
    )


def state_bytes(sizes: Sizes, recipe: Recipe, setup: Setup) -> dict[str, float]:
    """Weights, gradients, AdamW's two moments, and what is gathered or sent, on each GPU.

    Gradients and moments have the dtype of the weights (of LoRA float32, as PEFT makes it). DeepSpeed under bf16 keeps
    weights and gradients in bfloat16, and beside the moments a float32 copy of the weights (Rajbhandari et al. 2020,
    arXiv 1910.02054).
    """
    trained = trained_parameters(sizes, recipe)
    lora = trained - sizes.parameters.latents if recipe.lora_rank else 0
    frozen = sizes.parameters.total + lora - trained
    own = FLOAT32 if recipe.lora_rank else setup.weights
    gradient, moments = own, 2 * own
    weights = frozen * setup.weights + trained * own
    if setup.is_deepspeed and setup.bf16:
        gradient, moments, weights = 2, 3 * FLOAT32, 2 * (frozen + trained)
    shards = 1 if setup.engine in ("single", "ddp") else setup.count
    compute = setup.precision(recipe).compute
    # A layer and the one fetched after it; what belongs to no layer stays gathered.
    gathered = compute * (2 * sizes.parameters.layer + sizes.parameters.embeddings + sizes.parameters.latents)
    sent = {"ddp": trained * gradient, "zero2": min(BUCKET, trained) * gradient}
    return {
        "weights": weights / (setup.count if setup.engine in SHARDED else 1),
        "gradients": trained * (gradient / shards + setup.keeps_gradients * compute),
        "optimiser": trained * moments / shards,
        "gathered or sent": gathered if setup.engine in SHARDED else sent.get(setup.engine, 0),
    }


def communication_seconds(sizes: Sizes, recipe: Recipe, setup: Setup, gpu: GPU, made: int) -> float:
    """Of an optimiser's step, by rings: each GPU sends ``(n - 1) / n`` of what is gathered or reduced.

    Args:
        made: calls of the decoder in a micro-batch; engines that shard weights gather a layer's for each, forward and
            backward, and scatter its gradients.
    """
    n = setup.count
    if n == 1:
        return 0
    # Within a node NVLink; beyond it rings share a node's network, which is the slower one.
    bandwidth = LINK_SHARE * (gpu.link if n <= NODE else min(gpu.link, gpu.network))
    trained = trained_parameters(sizes, recipe)
    compute = setup.precision(recipe).compute
    once, each = 0.0, 0.0
    if setup.engine == "ddp":
        once = 2 * trained * (FLOAT32 if recipe.lora_rank else setup.weights)
    elif setup.engine == "zero2":
        once, each = trained * compute, trained * compute
    elif setup.engine in SHARDED:
        rest = sizes.parameters.total - sizes.parameters.layers
        each = compute * 2 * (made * sizes.parameters.layers + rest)
        scattered = compute * made * trained
        once, each = (scattered, each) if setup.keeps_gradients else (0, each + scattered)
    return (n - 1) / n * (once + setup.accumulation * each) / bandwidth
