"""Compile every kernel for every GPU without having one, and say what came out: `amvl-fast bench --compile`."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import multiprocessing
import os
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amvl_fast.errors import AMVLError

if TYPE_CHECKING:
    from amvl_fast.bench.machine_code import MachineCode
    from amvl_fast.bench.predictions import Prediction
    from amvl_fast.bench.specialisations import Specialisation


def require_compiler() -> None:
    """Raise AMVLError where Triton cannot compile: it is missing, or runs its interpreter."""
    try:
        from triton import knobs

        import amvl_fast.kernels.triton as kernels
    except ImportError as error:
        raise AMVLError(
            f"bench --compile needs Triton, which cannot be imported ({error}): on Linux, pip install triton."
        ) from None
    if kernels.INTERPRETED or knobs.runtime.interpret:
        raise AMVLError(
            "bench --compile cannot compile while Triton interprets: unset TRITON_INTERPRET and start again."
        )


def compile_all(ones: Sequence[Specialisation], workers: int | None = None) -> list[MachineCode]:
    """Compile and inspect each, about a second each, in `workers` processes (by default one a core)."""
    from tqdm import tqdm

    from amvl_fast.bench.machine_code import inspect

    workers = min(workers or len(os.sched_getaffinity(0)), len(ones)) or 1
    context = multiprocessing.get_context("spawn")  # a fork would copy PyTorch's threads in mid-air
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(cache,)) as pool,
    ):
        done = pool.map(inspect, ones, chunksize=4)
        return list(tqdm(done, total=len(ones), desc="compile", unit="kernel", disable=None))


def _start_worker(cache: str) -> None:
    # What is compiled for GPUs that are not here has no place in the user's own cache.
    os.environ["TRITON_CACHE_DIR"] = cache


def plan(wide: bool) -> list[Specialisation]:
    """What the report compiles: the widest choice of cases for sm_90, the common ones for every other target."""
    from amvl_fast.bench.compile_cases import all_cases, broad_cases, common_cases
    from amvl_fast.bench.predictions import predicted_launches
    from amvl_fast.bench.specialisations import MAIN_TARGET, TARGETS, specialisations

    ones = specialisations(all_cases() if wide else broad_cases(), [MAIN_TARGET])
    ones += specialisations(common_cases(wide), [target for target in TARGETS if target != MAIN_TARGET])
    known = {one.key for one in ones}
    predicted = {one.key: one for _, _, one in predicted_launches() if one.key not in known}
    return [*ones, *predicted.values()]


def columns(one: Specialisation, code: MachineCode, bytes_per_latent: float | None) -> dict[str, Any]:
    """One row of the table and of compile.csv."""
    from amvl_fast.bench.machine_code import occupancy

    case, nvidia = one.case, one.target.startswith("sm_")
    assert case is not None
    return {
        "target": one.target,
        "kernel": case.op,
        "dtypes": case.dtypes,
        "d": case.width,
        "layout": case.layout,
        "options": case.options,
        "aligned": one.aligned,
        "trips": one.trips,
        "error": code.error or "",
        "registers": code.registers,
        "spills": code.spills,
        "local": code.local,
        "stack_bytes": code.stack,
        "shared_bytes": code.shared,
        "warps": code.warps,
        "occupancy": occupancy(code.registers, code.warps, one.target) if nvidia and code.registers else math.nan,
        "loads": widths(code.loads),
        "stores": widths(code.stores),
        "wide_loads": code.wide_loads,
        "wide_stores": code.wide_stores,
        "bytes_per_latent": math.nan if bytes_per_latent is None else bytes_per_latent,
        **{name: code.instructions[name] for name in ("float", "integer", "special", "memory")},
    }


def widths(counts: dict[int, int]) -> str:
    """Widths in bits, and how many instructions have each: `128 x 4, 64 x 1`."""
    return ", ".join(f"{bits} x {count}" for bits, count in sorted(counts.items(), reverse=True))


def traffic_per_latent(ones: Iterable[Specialisation]) -> dict[str, float]:
    """Bytes that each specialisation moves a latent element, by its key."""
    from amvl_fast.bench.traffic import traffic_of

    # Neither width, layout, target nor what is stopped changes how much is moved for a latent element.
    small = {
        one.key: dataclasses.replace(one.case, width=64, layout="contiguous", leading=(2, 2), stop_gradient=True)
        for one in ones
        if one.case is not None
    }
    different = list(dict.fromkeys(small.values()))
    counted = dict(zip(different, traffic_of(different), strict=True))
    return {key: counted[case].bytes_per_latent for key, case in small.items()}


def report(directory: Path | None = None, *, wide: bool = True) -> str:
    """Compile everything and describe it.

    Args:
        directory: where to write compile.csv (a row per specialisation) and compile.json (those and the
            predictions), made if it does not exist; None writes nothing.
        wide: whether to compile all cases, some 1,500 kernels of about a second each, or the fifth of them that
            CI looks at, which has every value of every choice but few combinations.

    Returns:
        The report: a summary for each target, the table for sm_90, and predicted times.

    Raises:
        AMVLError: if Triton is missing or interprets instead of compiling.
    """
    require_compiler()
    from amvl_fast.bench.predictions import predict, predicted_launches
    from amvl_fast.bench.tables import render

    ones = plan(wide)
    codes = dict(zip([one.key for one in ones], compile_all(ones), strict=True))
    moved = traffic_per_latent(ones)
    rows = [columns(one, codes[one.key], moved.get(one.key)) for one in ones]
    predictions = [
        predict(gpu, shape, one, codes[one.key], moved[one.key])
        for gpu, shape, one in predicted_launches()
        if codes[one.key].error is None
    ]
    if directory is not None:
        write(directory, rows, predictions)
    return render(rows, predictions)


def write(directory: Path, rows: Sequence[dict[str, Any]], predictions: Sequence[Prediction]) -> None:
    """compile.csv and compile.json, each whole or not at all."""
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    predicted = [
        {**dataclasses.asdict(prediction), "seconds": prediction.seconds, "bound_by": prediction.bound_by}
        for prediction in predictions
    ]
    # JSON knows no NaN.
    plain = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in {
        "compile.csv": table.getvalue(),
        "compile.json": json.dumps({"kernels": plain, "predicted": predicted}, indent=1) + "\n",
    }.items():
        aside = directory / f".{name}.{os.getpid()}"
        aside.write_text(text)
        aside.replace(directory / name)
