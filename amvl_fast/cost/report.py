"""What a run would cost, before it is paid for: the report of ``amvl-fast plan``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from amvl_fast.cost.assumptions import assumptions
from amvl_fast.cost.engines import Setup, trained_parameters
from amvl_fast.cost.flops import EXECUTIONS, Recipe, Sample, step_flops
from amvl_fast.cost.gpus import GPU, GPUS, find_gpu
from amvl_fast.cost.memory import USABLE, memory_bytes
from amvl_fast.cost.runs import engine_of, lengths_of, recipe_of, setup_of
from amvl_fast.cost.sizes import Sizes, read_sizes
from amvl_fast.cost.timing import StepTime, step_time
from amvl_fast.errors import AMVLError
from amvl_fast.text import grid

if TYPE_CHECKING:
    from amvl_fast.training.config import RunConfig


def plan(
    config: RunConfig,
    *,
    gpu: str,
    count: int = 1,
    engine: str | None = None,
    prompt_tokens: int | None = None,
    answer_tokens: int | None = None,
    image_tokens: int | None = None,
    images: int = 1,
    rows: int | None = None,
) -> str:
    """Predict memory by part, step time and epoch hours of a run, for both executions side by side.

    Args:
        config: the run.
        gpu: a name that means one of `amvl_fast.cost.gpus.GPUS`.
        count: how many.
        engine: of `amvl_fast.cost.engines.ENGINES`; None is what the section ``training:`` asks for.
        prompt_tokens, answer_tokens: of a row, image tokens included; None reads them off the data file.
        image_tokens, images: how many of the prompt's tokens are of images, and of how many; none if only the former
            two are given.
        rows: of an epoch; None takes those of the data file, if it was read.

    Raises:
        AMVLError: an unknown GPU, engine or model, no lengths, or an objective without latents.
    """
    if not config.objective.terms.latents:
        raise AMVLError(f"objective.name is {config.objective.name!r}: only runs with latents can be planned.")
    name = find_gpu(gpu)
    sizes = read_sizes(config.model.backbone, config.latents, **config.model.hub)
    setup = setup_of(config, sizes, engine or engine_of(config, count), count)
    recipes = [recipe_of(config, execution) for execution in EXECUTIONS]
    lengths = lengths_of(config, prompt_tokens, answer_tokens, image_tokens, images)
    rows = rows or lengths.rows or None
    memory = {one.execution: memory_bytes(sizes, lengths.longest, one, setup) for one in recipes}
    times = {one.execution: step_time(sizes, lengths.mean, one, setup, GPUS[name]) for one in recipes}
    return "\n\n".join([
        heading(config, sizes, recipes[0], setup, name),
        memory_table(memory, GPUS[name]),
        operations_table(sizes, lengths.mean, recipes),
        time_table(times, setup, rows),
        conclusion(memory, times, GPUS[name]),
        assumptions(GPUS[name], recipes[0], setup, lengths),
    ])  # fmt: skip


def heading(config: RunConfig, sizes: Sizes, recipe: Recipe, setup: Setup, gpu: str) -> str:
    frozen = f"without {' and '.join(recipe.freeze)}" if recipe.freeze else "of all parts"
    training = f"LoRA of rank {recipe.lora_rank} on all linear maps" if recipe.lora_rank else f"training {frozen}"
    parts = vars(sizes.parameters)
    listed = ", ".join(f"{part} {parts[part]:,}" for part in ("vision", "connector", "layers", "embeddings", "latents"))
    batch = setup.batch * setup.accumulation * setup.count
    return (
        f"Predicted, not measured: {config.model.backbone} on {setup.count} x {gpu}, {setup.engine}, {training}\n"
        f"{sizes.parameters.backbone:,} parameters of the backbone, {trained_parameters(sizes, recipe):,} trained "
        f"({listed})\n"
        f"{setup.batch} samples a GPU and micro-batch x {setup.accumulation} x {setup.count} GPUs = {batch} a step; "
        f"activation checkpointing {'on' if recipe.checkpointing else 'off'}"
    )


def memory_table(memory: dict[str, dict[str, float]], gpu: GPU) -> str:
    parts = next(iter(memory.values()))
    lines = [[part, *(gigabytes(of[part]) for of in memory.values())] for part in parts]
    lines.append(["together", *(gigabytes(sum(of.values())) for of in memory.values())])
    lines.append(["fits", *("yes" if fits(of, gpu) else "NO" for of in memory.values())])
    return grid(["GB on each GPU", *memory], lines)


def operations_table(sizes: Sizes, sample: Sample, recipes: Sequence[Recipe]) -> str:
    counted = [step_flops(sizes, sample, recipe) for recipe in recipes]
    lines = [[part, *(teraflop(of[part].total) for of in counted)] for part in counted[0]]
    lines.append(["together", *(teraflop(sum(part.total for part in of.values())) for of in counted)])
    anew = [sum(part.recompute for part in of.values()) for of in counted]
    lines.append(["of it computed anew", *map(teraflop, anew)])
    return grid(["TFLOP a sample", *(recipe.execution for recipe in recipes)], lines)


def time_table(times: dict[str, StepTime], setup: Setup, rows: int | None) -> str:
    labels = dict(compute="computing", traffic="memory traffic", optimiser="optimiser", communication="communication")
    lines = [[label, *(f"{getattr(one, name):.3f}" for one in times.values())] for name, label in labels.items()]
    lines.append(["a step", *(f"{one.step:.3f}" for one in times.values())])
    batch = setup.batch * setup.accumulation * setup.count
    lines.append(["samples a second", *(f"{batch / one.step:.1f}" for one in times.values())])
    if rows is None:
        return grid(["seconds", *times], lines) + "\nEpoch hours are not known without the number of rows: give --rows."
    hours = [one.step * rows / batch / 3600 for one in times.values()]
    lines.append([f"hours for {rows:,} rows", *(f"{one:.2f}" for one in hours)])
    lines.append(["GPU hours", *(f"{setup.count * one:.1f}" for one in hours)])
    return grid(["seconds", *times], lines)


def conclusion(memory: dict[str, dict[str, float]], times: dict[str, StepTime], gpu: GPU) -> str:
    """One line."""
    fitting = [name for name, of in memory.items() if fits(of, gpu)]
    ratio = times["three_pass"].step / times["shared_prefix"].step
    faster = f"a step of shared_prefix is {ratio:.2f} times faster than one of three_pass"
    if times["three_pass"].step < 0.01:
        faster += ", by operations; steps this short are mostly launches and Python, which are left out"
    if not fitting:
        least = min(sum(of.values()) for of in memory.values())
        return (
            f"Neither fits: at least {gigabytes(least)} GB a GPU of {gpu.memory / 1e9:.0f} (LoRA, or an --engine that "
            f"shards, fsdp2 or zero3, takes less); {faster}."
        )
    which = "Both fit" if len(fitting) == 2 else f"Only {fitting[0]} fits"
    return f"{which}; {faster}."


def fits(memory: dict[str, float], gpu: GPU) -> bool:
    return sum(memory.values()) <= USABLE * gpu.memory


def teraflop(count: float) -> str:
    return f"{count / 1e12:.3f}" if count == 0 or count >= 1e9 else f"{count / 1e12:.1g}"


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f}" if count == 0 or count >= 1e7 else f"{count / 1e9:.1g}"
