"""All cases in one process: gate, measure, and put into rows."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from amvl_fast.bench.cases import MODES, Case, Inputs, make_inputs, make_rotation, overhead_case
from amvl_fast.bench.counters import CopyBandwidth, Stopwatch, launches, peak_memory
from amvl_fast.bench.gate import check
from amvl_fast.bench.gated import Gated, Measured
from amvl_fast.bench.machine import machine
from amvl_fast.bench.measure import OVERHEAD, QUICK, Budget, Times, interleave, no_collection, percentile, speedup
from amvl_fast.bench.providers import EAGER, OURS, Prepare, Provider, prepare, providers
from amvl_fast.ops.backends import choose_backend


class Suite(Gated[Case]):
    """The latent op."""

    def __init__(self, device: torch.device, *, quick: bool = False) -> None:
        super().__init__()
        self.device = device
        # Compilation takes longer than all the rest, so a quick run does without.
        self.compiled = not quick
        self.providers: list[Provider] = providers(device, compiled=self.compiled)
        self.budget, self.overhead_budget = (QUICK, QUICK) if quick else (Budget(), OVERHEAD)
        self.machine = machine(device)
        self._stopwatch = Stopwatch(device)
        self._copy: CopyBandwidth | None = None
        self._overhead: dict[str, dict[str, Times]] = {}
        self._rotation: tuple[Any, list[Inputs]] = (None, [])
        self._compiled_for: Any = None

    def _measure(self, case: Case) -> dict[str, Measured]:
        # A GPU's times come with the host's beside them. On the CPU they are one, so a case without work has to tell.
        small = self._overhead_times(case.mode) if self.device.type == "cpu" else None
        self._copy = self._copy or CopyBandwidth(self.device)
        rotation = self._rotated(case)
        before = self._copy.measure()
        prepared, times = self._gate_and_time(case, rotation, self.budget)
        copy = statistics.median(before + self._copy.measure())
        measured = {}
        for one in self.providers:
            run = prepared[one.name]
            with torch.set_grad_enabled(case.mode != "no-grad"):
                # The memory of a replay was reserved when it was captured.
                memory = None if one.graphed else peak_memory(run(rotation[0]), self.device)
                launched = launches(run(rotation[0]), self.device) if self.device.type == "cuda" else None
            own = one.name.startswith(OURS)
            row = {
                "op": "gaussian_dual_kl",
                **dict(batch=case.batch, slots=case.slots, d=case.d, dtype=case.dtype_name, mode=case.mode),
                "provider": one.name,
                "backend": choose_backend(None, rotation[0].leaves, self.device) if own else "",
                **timings(case, times[one.name], times[EAGER], copy),
                "peak_mib": None if memory is None else memory / 2**20,
                "launches": launched,
                "host_us": host_microseconds((small or times)[one.name]),
            }
            measured[one.name] = Measured(row, [seconds for seconds, _ in times[one.name]])
        return measured

    def _gate_and_time(
        self, case: Case, rotation: list[Inputs], budget: Budget
    ) -> tuple[dict[str, Prepare], dict[str, Times]]:
        """The calls of the gate are also those that compile."""
        if self.compiled:
            self._ready_compiler(case, rotation)
        prepared = {one.name: prepare(one, case.mode) for one in self.providers}
        with torch.set_grad_enabled(case.mode != "no-grad"):
            for name, run in prepared.items():
                check(case, name, run(rotation[0]), rotation[0])
            with no_collection():
                return prepared, interleave(prepared, rotation, self._stopwatch, budget)

    def _ready_compiler(self, case: Case, rotation: list[Inputs]) -> None:
        """Batches vary in training and d does not: code that holds for any batch is compiled once for each d."""
        if (case.d, case.dtype) != self._compiled_for:
            # Or it would generalise over d as well, and after eight sizes quietly give up.
            torch.compiler.reset()
            self._compiled_for = case.d, case.dtype
        if case.batch > 1:
            for leaf in (leaf for inputs in rotation for leaf in inputs.leaves):
                torch._dynamo.maybe_mark_dynamic(leaf, 0)

    def _overhead_times(self, mode: str) -> dict[str, Times]:
        if not self._overhead:
            # All modes at once, so that what is compiled for this size is compiled once.
            for each in MODES:
                case = overhead_case(each)
                inputs = [make_inputs(case, self.device)]
                self._overhead[each] = self._gate_and_time(case, inputs, self.overhead_budget)[1]
        return self._overhead[mode]

    def _rotated(self, case: Case) -> list[Inputs]:
        """The inputs of the case; those of the shape before are let go first."""
        key = case.shape, case.dtype
        if self._rotation[0] != key:
            self._rotation = None, []
            self._rotation = key, make_rotation(case, self.device)
        return self._rotation[1]


def timings(case: Case, times: Times, baseline: Times, copy: float) -> dict[str, Any]:
    """The columns that follow from the times of the rounds, in seconds, and from a copy's bytes a second."""
    p20, p50, p80 = (percentile([seconds for seconds, _ in times], percent) for percent in (20, 50, 80))
    return {
        "rounds": len(times),
        **dict(p20_ms=1e3 * p20, p50_ms=1e3 * p50, p80_ms=1e3 * p80),
        "speedup": speedup(baseline, times),
        "gb_per_s": case.bytes_moved / p50 / 1e9,
        "copy_gb_per_s": copy / 1e9,
        "percent_of_copy": 100 * case.bytes_moved / p50 / copy,
    }


def host_microseconds(times: Times) -> float:
    return 1e6 * statistics.median(host for _, host in times)
