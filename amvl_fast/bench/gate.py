"""The correctness gate: nobody is timed who does not give the right answer on the inputs of the case.

Providers draw their own noise from different generators, so there is no one z to compare with. But z tells its noise,
(z - mean_q) / exp(logvar_q / 2): that has to look standard normal, and given it everything else is determined. The
oracle is `amvl_fast.reference.gaussian_dual_kl` in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from amvl_fast import reference
from amvl_fast.bench.cases import Case, Inputs
from amvl_fast.errors import AMVLError

NAMES = ("z", "forward_kl", "reverse_kl", *(f"grad of {x}" for x in ("mean_q", "logvar_q", "mean_p", "logvar_p")))
ROWS_COMPARED = 512  # evenly spread, the first and the last among them; all rows must be finite
SIGMAS = 6.0  # of the moments of the noise
REPEATED_ELEMENTS = 2**20  # up to this size a second call shows whether noise is fresh


class GateError(AMVLError):
    """A provider is wrong, so there is nothing to report."""


def check(case: Case, provider: str, timed: Callable[[], tuple[Tensor, ...]], inputs: Inputs) -> None:
    """Call what would be timed and compare what it returns with the oracle.

    Raises:
        GateError: it is wrong; the message says who, where and by how much.
    """

    def red(what: str) -> GateError:
        return GateError(f"the correctness gate is red: {provider} on {case.name}: {what}; nothing is reported.")

    results = timed()
    wanted = 3 if case.mode in ("forward", "no-grad") else 7
    if len(results) != wanted:
        raise red(f"{len(results)} results instead of {wanted}")
    for name, result, like in zip(NAMES, results, results_like(inputs), strict=False):
        if result.shape != like.shape or result.dtype != like.dtype:
            raise red(f"{name} is {result.dtype} {list(result.shape)} instead of {like.dtype} {list(like.shape)}")
        if not result.isfinite().all():
            raise red(f"{name} is not finite")

    rows = torch.linspace(0, case.batch * case.slots - 1, min(ROWS_COMPARED, case.batch * case.slots)).long()
    found = [pick(result, rows, case) for result in results]
    leaves = [pick(leaf, rows, case).requires_grad_() for leaf in inputs.leaves]
    mean_q, logvar_q, mean_p, logvar_p = leaves
    noise = (found[0] - mean_q.detach()) / torch.exp(logvar_q.detach() / 2)
    what = not_standard_normal(noise)
    if what is not None:
        raise red(f"the noise in z {what}")
    with torch.enable_grad():
        expected: list[Tensor] = list(reference.gaussian_dual_kl(mean_q, logvar_q, mean_p, logvar_p, noise))
        if wanted == 7:
            expected += torch.autograd.grad(expected, leaves, [pick(c, rows, case) for c in inputs.cotangents])
    for name, result, value, oracle in zip(NAMES, results, found, expected, strict=False):
        # A rounding or two to store the result, and the rounding errors of some dozen float32 operations.
        tolerance = 2 * torch.finfo(result.dtype).eps + 64 * torch.finfo(torch.float32).eps
        oracle = oracle.detach()
        error = ((value - oracle).abs() / (oracle.abs() + oracle.square().mean().sqrt() + 1e-30)).max().item()
        if error > tolerance:
            raise red(f"{name} is off by {error:.1e} relative to the float64 oracle, and {tolerance:.1e} is allowed")
    # Copied where a second call may overwrite what the first returned, as the replay of a CUDA graph does.
    first = found[0]
    if case.mode != "backward" and case.elements <= REPEATED_ELEMENTS and pick(timed()[0], rows, case).equal(first):
        raise red("two calls gave the same z, so noise is not drawn anew")


def results_like(inputs: Inputs) -> tuple[Tensor, ...]:
    """z and the KLs look like their cotangents, gradients like their leaves."""
    return (*inputs.cotangents, *inputs.leaves)


def pick(tensor: Tensor, rows: Tensor, case: Case) -> Tensor:
    """A float64 copy of some rows."""
    return tensor.detach().flatten(0, 1)[rows.to(tensor.device)].double()


def not_standard_normal(noise: Tensor) -> str | None:
    """What is wrong with the noise, judged by its moments, or None."""
    count = noise.numel()
    moments = {
        "mean": (noise.mean(), 0, 1),
        "variance": (noise.var(), 1, 2),
        "fourth moment": ((noise**4).mean(), 3, 96),
    }
    for name, (moment, expected, variance) in moments.items():
        bound = SIGMAS * math.sqrt(variance / count)
        if not abs(moment.item() - expected) < bound:
            return f"has {name} {moment.item():.3f} instead of {expected} give or take {bound:.3f}"
    return None
