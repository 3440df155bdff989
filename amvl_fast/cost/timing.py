"""Time of a training step, predicted: the slower of computing and moving memory, and what GPUs send each other."""

from __future__ import annotations

from dataclasses import dataclass

from amvl_fast.cost.activations import activation_bytes
from amvl_fast.cost.engines import SHARDED, Setup, communication_seconds, trained_parameters
from amvl_fast.cost.flops import Recipe, Sample, calls, step_flops
from amvl_fast.cost.gpus import GPU
from amvl_fast.cost.sizes import Decoder, Sizes

SHARE = 0.5  # of a GPU's peak that a step reaches


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimiser's step; `step` is all of it."""

    compute: float
    traffic: float
    optimiser: float
    communication: float
    step: float


def weight_traffic(decoder: Decoder, made: int, recipe: Recipe) -> int:
    """Numbers of weights and gradients that a micro-batch reads and writes, in `made` calls of the decoder.

    Weights are read forward, backward and where layers run again; their gradients are written, and added up from the
    second call on, which reads two and writes one. The head is called once, whoever asks.
    """
    gradients = recipe.trains("language_model") * (made + 3 * (made - 1))
    layers = decoder.layers * decoder.layer_weights * ((2 + recipe.checkpointing) * made + gradients)
    return layers + decoder.head_weights * (2 + recipe.trains("language_model"))


def moved_bytes(sizes: Sizes, sample: Sample, recipe: Recipe, setup: Setup) -> float:
    """Read and written in a micro-batch: weights, their gradients, and activations once each."""
    precision = setup.precision(recipe)
    whole = Recipe(**{**vars(recipe), "checkpointing": False})
    activations = 2 * setup.batch * sum(activation_bytes(sizes, sample, whole, precision).values())
    made = len(calls(sizes.k, sizes.end, sample, recipe))
    return precision.compute * weight_traffic(sizes.decoder, made, recipe) + (1 + recipe.checkpointing) * activations


def step_time(sizes: Sizes, sample: Sample, recipe: Recipe, setup: Setup, gpu: GPU) -> StepTime:
    """Of an optimiser's step with all its micro-batches."""
    micro = setup.batch * sum(part.total for part in step_flops(sizes, sample, recipe).values())
    compute = setup.accumulation * micro / (SHARE * gpu.matrix_flops)
    traffic = setup.accumulation * moved_bytes(sizes, sample, recipe, setup) / gpu.bandwidth
    # AdamW reads weight, gradient and two moments, and writes three of them: 7 numbers of float32.
    sharded = setup.engine not in ("single", "ddp")
    optimiser = 7 * 4 * trained_parameters(sizes, recipe) / (setup.count if sharded else 1) / gpu.bandwidth
    sent = communication_seconds(sizes, recipe, setup, gpu, len(calls(sizes.k, sizes.end, sample, recipe)))
    busy = max(compute, traffic)
    # Gathering ahead overlaps with computing; gradients reduced at a step's end are taken not to.
    step = max(busy, sent) if setup.engine in SHARDED else busy + sent
    return StepTime(compute, traffic, optimiser, sent, step + optimiser)
