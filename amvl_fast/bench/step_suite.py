"""All step cases in one process: gate, measure in turns, and put into rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from amvl_fast import AMVLModel
from amvl_fast.bench.counters import Stopwatch, peak_memory
from amvl_fast.bench.gate import GateError
from amvl_fast.bench.gated import Gated, Measured
from amvl_fast.bench.machine import machine
from amvl_fast.bench.measure import QUICK, Budget, Times, interleave, no_collection, percentile, speedup
from amvl_fast.bench.steps import (
    FLOOR,
    OURS,
    SEVERAL,
    THREE_PASS,
    Step,
    StepCase,
    contestants,
    make_model,
    make_steps,
)

# Seven rounds or more make a steady median; of the longest prompts, whose rounds take many seconds, three will do.
BUDGET = Budget(seconds=15, max_rounds=60, min_rounds=7, patience=20)
TOLERANCE = {"loss": 1e-5, "gradient": 1e-5}  # relative; of the gradient the norm of the difference over its own


class StepSuite(Gated[StepCase]):
    """The whole step, forward and backward."""

    def __init__(self, device: torch.device, *, quick: bool = False) -> None:
        super().__init__()
        self.device = device
        self.budget = QUICK if quick else BUDGET
        self.machine = machine(device)
        self._stopwatch = Stopwatch(device)
        self._models: dict[int, AMVLModel] = {}

    def _measure(self, case: StepCase) -> dict[str, Measured]:
        model = self._model(case.k)
        every = make_steps(model, case, self.device)
        steps = {name: every[name] for name in contestants(case)}
        check_steps(case, model, steps)
        with no_collection():
            times = interleave(
                {name: constantly(step) for name, step in steps.items()}, [None], self._stopwatch, self.budget
            )
        peaks = {name: self._peak(model, step) for name, step in steps.items()}
        return {
            name: Measured(step_row(case, name, times, peaks[name]), [seconds for seconds, _ in times[name]])
            for name in steps
        }

    def _peak(self, model: nn.Module, step: Step) -> int:
        # Gradients of the step before would be freed within the count, and hide as many bytes of this one.
        model.zero_grad()
        return peak_memory(step, self.device)

    def _model(self, k: int) -> AMVLModel:
        if k not in self._models:
            with self.device:
                self._models[k] = make_model(k)
        return self._models[k]


def constantly(step: Step) -> Callable[[None], Step]:
    """Steps bring their own inputs."""
    return lambda _: step


def check_steps(case: StepCase, model: nn.Module, steps: dict[str, Step]) -> None:
    """The gate: from one seed, the shared prefix and three passes give the same loss and gradients.

    Raises:
        GateError: they do not, or something is not finite; the message says where and by how much.
    """
    loss, gradient = outcome(model, steps[OURS])
    expected_loss, expected_gradient = outcome(model, steps[THREE_PASS])
    errors = {
        "loss": (loss - expected_loss).abs() / expected_loss.abs(),
        "gradient": (gradient - expected_gradient).norm() / expected_gradient.norm(),
    }
    for what, error in errors.items():
        if not error.item() <= TOLERANCE[what]:  # so that NaN is refused, too
            raise GateError(
                f"the correctness gate is red: {OURS} on {case.name}: its {what} is off by {error.item():.1e} relative "
                f"to {THREE_PASS}, and {TOLERANCE[what]:.0e} is allowed; nothing is reported."
            )


def outcome(model: nn.Module, step: Step) -> tuple[Tensor, Tensor]:
    """Loss and all gradients in one vector, in float64, with the noise of a fixed seed."""
    torch.manual_seed(0)
    loss = step().detach().double()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return loss, torch.cat([gradient.flatten() for gradient in gradients]).double()


def step_row(case: StepCase, name: str, times: dict[str, Times], peak: int) -> dict[str, Any]:
    """A row of the results; ratios are medians of those within a round."""
    own = times[name]
    p20, p50, p80 = (1e3 * percentile([seconds for seconds, _ in own], percent) for percent in (20, 50, 80))
    return {
        **dict(prompt=case.prompt, answer=case.answer, k=case.k, batch=case.batch),
        **dict(provider=name, rounds=len(own), p20_ms=p20, p50_ms=p50, p80_ms=p80),
        "speedup": speedup(times[THREE_PASS], own),
        "over_floor": speedup(own, times[FLOOR]),
        "over_one_sample": speedup(own, times[OURS]) if name == SEVERAL else None,
        "peak_mib": peak / 2**20,
    }
