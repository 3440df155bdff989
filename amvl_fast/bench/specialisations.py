"""What gets compiled: the launches of the real launchers, recorded instead of run.

Nothing here repeats what a launcher decides. Each case calls one with tensors on the meta device, which have
shapes, strides and alignment but no memory, and Triton's own launch code derives the specialisation; a hook of
Triton's takes it right before it would be compiled for a GPU that need not exist.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from amvl_fast.bench.compile_cases import Case

TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)},
    **{arch: GPUTarget("hip", arch, 64) for arch in ("gfx90a", "gfx942")},
}
MAIN_TARGET = "sm_90"


@dataclass
class Specialisation:
    """What one launch asks Triton to compile; plain data, for a worker process.

    Attributes:
        target: a key of `TARGETS`.
        module, function: where the kernel is defined.
        signature, constants, attributes, options: as `triton.compile` takes them.
        programs: the size of the launch grid.
        elements: latent elements of that launch, or 0 where nobody said.
        trips: how often a program's loop over columns is walked.
        aligned: whether 16-byte accesses are possible throughout.
        case: the first case that asked for it, if it was one.
        key: equal for equal specialisations.
    """

    target: str
    module: str
    function: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    programs: int
    key: str
    elements: int = 0
    trips: int = 1
    aligned: bool = False
    case: Case | None = None

    def constant(self, name: str) -> Any:
        """The value of a constexpr parameter."""
        return self.constants[(list(self.signature).index(name),)]


class _NoDevice:
    """Stands where Triton keeps its driver, and knows just which GPU to pretend."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_device(self) -> str:
        return f"compile report, {self.target}"  # a key of Triton's caches that no real device has

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]


def record(launch: Callable[[], Any], target: str) -> tuple[Any, list[Specialisation]]:
    """What `launch()` returns, and the specialisations that its launches would compile; nothing runs."""
    recorded: list[Specialisation] = []
    grids: list[tuple[int, ...]] = []
    run = triton.JITFunction.run

    def run_with_grid(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        grids.append(grid)
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    def hook(*, fn: Any, compile: Any, **_: Any) -> bool:
        options = json.loads(compile["specialization_data"])["options"]
        recorded.append(
            Specialisation(
                target=target,
                module=fn.module,
                function=fn.name,
                signature=compile["signature"],
                constants=compile["constants"],
                attributes=compile["configs"][0],
                options={name: tuple(v) if isinstance(v, list) else v for name, v in options.items()},
                programs=math.prod(grids[-1]),
                key=compile["specialization_data"],
            )
        )
        return True  # done: Triton goes back to the launcher without compiling

    with (
        mock.patch.object(driver, "_active", _NoDevice(target)),
        mock.patch.object(triton.JITFunction, "run", run_with_grid),
        mock.patch.object(knobs.runtime, "jit_cache_hook", hook),
    ):
        result = launch()
    return result, recorded


def specialisations(cases: Iterable[Case], targets: Iterable[str]) -> list[Specialisation]:
    """The different specialisations that the cases need on the targets, each under the first case that needs it."""
    found: dict[str, Specialisation] = {}
    for target, case in itertools.product(targets, list(cases)):
        (aligned, elements), recorded = record(case.launch, target)
        for one in recorded:
            one.aligned, one.elements, one.case = aligned, elements, case
            # Only the kernel that sums rows walks them; the others have a program for each piece of a row.
            one.trips = -(-case.width // one.constant("BLOCK_COLUMNS")) if case.op == "gaussian_dual_kl_forward" else 1
            # Equal machine code may serve aligned and unaligned rows; it is judged by the stricter use.
            found.setdefault(one.key, one).aligned |= aligned
    return list(found.values())
