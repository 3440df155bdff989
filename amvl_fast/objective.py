"""What is trained: the loss terms of an ablation row by name, and their weights over the steps.

The paper (arXiv 2607.00461) says that `beta` warms up first and that `gamma` comes later and stays weaker. The
values, the lengths of the ramps and their linear shape are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from amvl_fast.errors import AMVLError


class Terms(NamedTuple):
    """Which terms of the loss a row of the ablation table has."""

    latents: bool = True
    ntp: bool = True
    forward_kl: bool = False
    reverse_kl: bool = False
    gamma_first: bool = False
    stop_gradient: bool = True


OBJECTIVES = {
    "no_latents": Terms(latents=False),
    "ntp": Terms(),
    "forward_kl": Terms(ntp=False, forward_kl=True),
    "reverse_kl": Terms(ntp=False, reverse_kl=True),
    "ntp_forward_kl": Terms(forward_kl=True),
    "ntp_reverse_kl": Terms(reverse_kl=True),
    "amvl_gamma_first": Terms(forward_kl=True, reverse_kl=True, gamma_first=True),
    "amvl": Terms(forward_kl=True, reverse_kl=True),
    # Not a row of the paper's table: NTP + KL(q || p) without stop-gradients, the usual evidence lower bound.
    "elbo": Terms(forward_kl=True, stop_gradient=False),
}


POSTERIOR_BOUNDS = ("mean", "importance")


def require_bound(num_posterior_samples: int, posterior_bound: str) -> None:
    """Raise AMVLError if there is no such bound or no sample for it."""
    if posterior_bound not in POSTERIOR_BOUNDS:
        raise AMVLError(f"posterior_bound={posterior_bound!r} is not known; use one of {POSTERIOR_BOUNDS}.")
    if num_posterior_samples < 1:
        raise AMVLError(f"num_posterior_samples is {num_posterior_samples}; it must be at least 1.")


@dataclass(frozen=True)
class Objective:
    """One row of the ablation table with its weights.

    Args:
        name: a key of `OBJECTIVES`; it says which terms there are. A weight of a term that is not there is ignored.
        beta: final weight of the forward KL, KL(q || p) with q the posterior.
        gamma: final weight of the reverse KL, KL(p || q).
        ntp_weight: weight of the answer's loss decoded from a posterior sample.
        prior_ntp_weight: weight of the answer's loss decoded from a prior sample. Ours, off by default; it trains
            what inference does.
        kl_warmup_steps: length of each KL's linear ramp from 0; below 1 it is a share of the training's steps.
        kl_delay_steps: where the second KL's ramp begins (gamma's, or beta's when gamma comes first); likewise.
        free_bits, num_posterior_samples, posterior_bound: see `AMVLModel.forward`. Ours.

    Raises:
        AMVLError: an unknown name or a negative weight.
    """

    name: str = "amvl"
    beta: float = 1.0
    gamma: float = 0.3
    ntp_weight: float = 1.0
    prior_ntp_weight: float = 0.0
    kl_warmup_steps: float = 0.1
    kl_delay_steps: float = 0.2
    free_bits: float = 0.0
    num_posterior_samples: int = 1
    posterior_bound: str = "mean"

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise AMVLError(f"objective.name is {self.name!r}; use one of: {', '.join(OBJECTIVES)}.")
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) and value < 0:
                raise AMVLError(f"objective.{field.name} is {value}; it must be at least 0.")
        require_bound(self.num_posterior_samples, self.posterior_bound)

    @property
    def terms(self) -> Terms:
        return OBJECTIVES[self.name]

    def at(self, step: int, total_steps: int) -> dict[str, Any]:
        """The keyword arguments of `AMVLModel.forward` at `step` of `total_steps`; none without latents."""
        terms = self.terms
        if not terms.latents:
            return {}
        first = self._ramp(step, total_steps, 0)
        second = self._ramp(step, total_steps, _steps(self.kl_delay_steps, total_steps))
        forward, reverse = (second, first) if terms.gamma_first else (first, second)
        return {
            "beta": terms.forward_kl * forward * self.beta,
            "gamma": terms.reverse_kl * reverse * self.gamma,
            "ntp_weight": terms.ntp * self.ntp_weight,
            "prior_ntp_weight": self.prior_ntp_weight,
            "free_bits": self.free_bits,
            "stop_gradient": terms.stop_gradient,
            "num_posterior_samples": self.num_posterior_samples,
            "posterior_bound": self.posterior_bound,
        }

    def _ramp(self, step: int, total_steps: int, start: int) -> float:
        length = _steps(self.kl_warmup_steps, total_steps)
        if step < start:
            return 0.0
        return min(1.0, (step - start + 1) / length) if length else 1.0


def _steps(value: float, total_steps: int) -> int:
    return round(value * total_steps) if value < 1 else round(value)
