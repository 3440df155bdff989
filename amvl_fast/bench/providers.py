"""Who is compared: each provider computes (z, forward_kl, reverse_kl) from (mean_q, logvar_q, mean_p, logvar_p).

Each call draws its noise anew and pays for that, as in training, in its time and in its kernels on the GPU. Eager peers
launch one kernel to write the noise, which they then read; what a compiled one launches is up to its compiler. Ours
makes the noise where it uses it, and launches one for the seed, which it draws from PyTorch's generator like a user who
gives none: with the op's own that is two forward, and one more backward. A replayed CUDA graph launches what was
captured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from amvl_fast import ops, reference
from amvl_fast.bench.cases import Inputs

Function = Callable[..., tuple[Tensor, Tensor, Tensor]]

EAGER, OURS = "eager", "amvl_fast"


def eager(mean_q: Tensor, logvar_q: Tensor, mean_p: Tensor, logvar_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return reference.gaussian_dual_kl(mean_q, logvar_q, mean_p, logvar_p, torch.randn_like(mean_q))


def distributions(mean_q: Tensor, logvar_q: Tensor, mean_p: Tensor, logvar_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As a user of torch.distributions writes it who cares for speed and accuracy.

    Without the checks of arguments, which wait for the device, and in float32, since sums of bfloat16 terms are no KL.
    """

    def normal(mean: Tensor, logvar: Tensor) -> Normal:
        return Normal(mean.float(), (logvar.float() / 2).exp(), validate_args=False)

    q, p = normal(mean_q, logvar_q), normal(mean_p, logvar_p)
    stopped_q = Normal(q.loc.detach(), q.scale.detach(), validate_args=False)
    stopped_p = Normal(p.loc.detach(), p.scale.detach(), validate_args=False)
    z = q.rsample().to(mean_q.dtype)
    return z, kl_divergence(stopped_q, p).sum(-1), kl_divergence(stopped_p, q).sum(-1)


def ours(mean_q: Tensor, logvar_q: Tensor, mean_p: Tensor, logvar_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The backend that a user gets who asks for none."""
    return ops.gaussian_dual_kl(mean_q, logvar_q, mean_p, logvar_p)


@dataclass(frozen=True)
class Provider:
    """A name in the tables and the function behind it, `graphed` if a CUDA graph of it is replayed."""

    name: str
    function: Function
    graphed: bool = False


def providers(device: torch.device, *, compiled: bool = True) -> list[Provider]:
    """Everyone who can run on the device, compiled ones only if asked for."""
    everyone = [Provider(EAGER, eager)]
    if compiled:
        everyone.append(Provider("compiled", torch.compile(eager)))
    everyone += [Provider("distributions", distributions), Provider(OURS, ours)]
    if compiled:
        everyone.append(Provider(f"{OURS} compiled", torch.compile(ours)))
    if device.type == "cuda":
        everyone.append(Provider(f"{OURS} CUDA graph", ours, graphed=True))
    return everyone


# Calling a Prepare does what a mode leaves out of the clock and returns what belongs in: a function that returns the
# three outputs, and behind them the four gradients in the modes that have them.
Timed = Callable[[], tuple[Tensor, ...]]
Prepare = Callable[[Inputs], Timed]


def prepare(provider: Provider, mode: str) -> Prepare:
    return Replay(provider.function, mode) if provider.graphed else partial(call, provider.function, mode)


def call(function: Function, mode: str, inputs: Inputs) -> Timed:
    leaves, cotangents = inputs
    if mode in ("forward", "no-grad"):
        return lambda: tuple(function(*leaves))
    if mode == "full":
        return lambda: differentiated(function(*leaves), inputs)
    outputs = function(*leaves)
    return lambda: differentiated(outputs, inputs)


def differentiated(outputs: tuple[Tensor, ...], inputs: Inputs) -> tuple[Tensor, ...]:
    """Gradients are returned instead of accumulated in the leaves: the sum would be measured with them."""
    return (*outputs, *torch.autograd.grad(outputs, inputs.leaves, inputs.cotangents))


@dataclass
class Replay:
    """Captures one CUDA graph per set of inputs, since a graph reads where it read when it was captured."""

    function: Function
    mode: str
    captured: dict[int, tuple[Inputs, list[torch.cuda.CUDAGraph], tuple[Tensor, ...]]] = field(default_factory=dict)

    def __call__(self, inputs: Inputs) -> Timed:
        # By id, and held: a graph keeps neither the memory it reads nor the id from being used for something else.
        if id(inputs) not in self.captured:
            self.captured[id(inputs)] = inputs, *self.capture(inputs)
        _, graphs, results = self.captured[id(inputs)]
        for graph in graphs[:-1]:
            graph.replay()

        def timed() -> tuple[Tensor, ...]:
            graphs[-1].replay()
            return results

        return timed

    def capture(self, inputs: Inputs) -> tuple[list[torch.cuda.CUDAGraph], tuple[Tensor, ...]]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                call(self.function, self.mode, inputs)()
        torch.cuda.current_stream().wait_stream(aside)
        graphs = [torch.cuda.CUDAGraph()]
        with torch.cuda.graph(graphs[0]):
            timed: Any = call(self.function, self.mode, inputs)
            results = None if self.mode == "backward" else timed()
        if results is None:
            # What forward saved must survive until backward reads it, hence one pool for the two.
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[1], pool=graphs[0].pool()):
                results = timed()
        return graphs, results
