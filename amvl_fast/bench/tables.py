"""The compile report as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import triton

from amvl_fast.bench.compile_cases import PURE_DTYPES
from amvl_fast.bench.predictions import ASSUMPTIONS, LAUNCH, Prediction
from amvl_fast.bench.specialisations import MAIN_TARGET
from amvl_fast.text import grid

Row = dict[str, Any]


def render(rows: Sequence[Row], predictions: Sequence[Prediction]) -> str:
    """The whole report."""
    failed = [row for row in rows if row["error"]]
    parts = [
        f"Machine code of {len(rows)} kernel specialisations, triton {triton.__version__}, torch {torch.__version__}",
        "Each target, the worst over its specialisations\n" + summary(rows),
        f"{MAIN_TARGET}, contiguous tensors and default options; compile.csv (--output) has the rest\n"
        + main_table(rows),
        "Predicted times of gaussian_dual_kl\n" + predicted_table(predictions) + "\n\n" + ASSUMPTIONS,
    ]
    crowded = [row for row in rows if row["target"] == MAIN_TARGET and row["occupancy"] < 0.5]
    if crowded:
        lines = (f"{name(row)}: {row['registers']} registers, {percent(row['occupancy'])}" for row in crowded)
        parts.insert(2, f"Registers leave room for less than half of the warps of {MAIN_TARGET}\n" + "\n".join(lines))
    if failed:
        parts.insert(1, "DID NOT COMPILE\n" + "\n".join(f"{name(row)}: {row['error']}" for row in failed))
    return "\n\n".join(parts)


def name(row: Row) -> str:
    """A specialisation in words."""
    words = [row["target"], row["kernel"], row["dtypes"], f"d={row['d']}", row["layout"], row["options"]]
    return " ".join(word for word in words if word)


def percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.0f}%"


def worst(rows: Iterable[Row], column: str, of: Callable[[Iterable[float]], float] = max) -> float:
    """The worst value of a column, NaN left out; NaN if nothing is left."""
    values = [row[column] for row in rows if not row["error"] and not math.isnan(row[column])]
    return of(values) if values else math.nan


def summary(rows: Sequence[Row]) -> str:
    """A line per target."""
    lines = []
    for target in dict.fromkeys(row["target"] for row in rows):
        mine = [row for row in rows if row["target"] == target]
        aligned = [row for row in mine if row["aligned"]]
        lines.append([
            target,
            len(mine),
            sum(bool(row["error"]) for row in mine),
            *(f"{worst(mine, column):.0f}" for column in ("registers", "spills", "local", "shared_bytes")),
            percent(worst(mine, "occupancy", min)),
            percent(worst(aligned, "wide_loads", min)),
            percent(worst(aligned, "wide_stores", min)),
        ])  # fmt: skip
    header = "target,kernels,failed,registers,spills,local,shared B,occupancy,128-bit loads,128-bit stores".split(",")
    note = (
        "\noccupancy: share of warps that registers leave room for. 128-bit: the share of latent tensors' bytes that\n"
        "128-bit instructions move, where rows begin at multiples of 16 bytes; with mixed dtypes a thread takes 16\n"
        "bytes of the widest and less of the others.\n"
        "On AMD, whose wavefronts have 64 threads, a thread has half as many columns: see compile.csv (--output)."
    )
    return grid(header, lines) + note


def main_table(rows: Sequence[Row]) -> str:
    """A line per kernel, dtype and width on the main target."""
    shown = [
        row
        for row in rows
        if row["target"] == MAIN_TARGET
        and row["layout"] == "contiguous"
        and not row["options"]
        and not row["error"]
        and row["dtypes"] in PURE_DTYPES
    ]
    header = "kernel,dtype,d,registers,spills,local,shared B,occupancy,loads,stores,B/latent".split(",")
    return grid(header, ([
        row["kernel"],
        row["dtypes"],
        row["d"],
        *(row[column] for column in ("registers", "spills", "local", "shared_bytes")),
        percent(row["occupancy"]),
        row["loads"],
        row["stores"],
        f"{row['bytes_per_latent']:.2f}",
    ] for row in shown))  # fmt: skip


def predicted_table(predictions: Iterable[Prediction]) -> str:
    """A line per launch and GPU; all times in microseconds."""
    header = "gpu,shape,kernel,dtype,MB,bandwidth,instructions,latency,predicted us,of bound,bound by".split(",")
    return grid(header, ([
        one.gpu,
        one.shape,
        one.op,
        one.dtypes,
        f"{one.bytes / 1e6:.2f}",
        *(f"{1e6 * seconds:.2f}" for seconds in (one.bandwidth, one.instructions, one.latency, one.seconds)),
        percent((LAUNCH + one.bandwidth) / one.seconds),
        one.bound_by,
    ] for one in predictions))  # fmt: skip
