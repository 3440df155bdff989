"""The boundary at which torch.compile stops tracing and the kernels begin."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from amvl_fast.errors import AMVLError

_IN_MEMORY = (torch.Tensor, torch.nn.Parameter)


def boundary(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the operator `torch.ops.amvl_fast.<name>`, and go through it only when compiling.

    A registered operator is one opaque node for torch.compile and for everything else that works on graphs. In
    eager mode the dispatcher would only add microseconds, so the function is called directly there.

    Args:
        schema: name, arguments and results, as `torch.library.define` takes them.
        fake: given the same arguments, makes results of the same shapes, dtypes and devices without computing.
    """
    name = "amvl_fast::" + schema.partition("(")[0]
    torch.library.define(name, schema.partition("(")[1] + schema.partition("(")[2])

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def on_memory(*arguments: Any) -> Any:
            # PyTorch may keep a sign in a bit beside the memory, as of `x.conj().imag`, where no kernel sees it.
            return function(*(a.resolve_neg() if isinstance(a, torch.Tensor) else a for a in arguments))

        torch.library.impl(name, ("CPU", "CUDA"), on_memory)
        torch.library.register_fake(name, fake)
        operator = getattr(torch.ops.amvl_fast, name.partition("::")[2]).default

        @wraps(function)
        def call(*arguments: Any) -> Any:
            # What is a tensor of another kind, a fake one for example, has no memory to hand to a kernel.
            direct = not torch.compiler.is_compiling() and all(
                type(a) in _IN_MEMORY for a in arguments if isinstance(a, torch.Tensor)
            )
            return on_memory(*arguments) if direct else operator(*arguments)

        return call

    return register


def no_transforms(op: str) -> None:
    """Refuse to run kernels on the wrapped tensors of torch.func, which have no memory.

    The form of an autograd function that torch.func wants, with a `setup_context`, binds its arguments by name at
    every call, which takes longer than the kernel of the paper's latents. And what would `torch.func.vmap` mean for
    noise that counts rows?

    Raises:
        AMVLError: under a transform of torch.func.
    """
    if torch._C._are_functorch_transforms_active():
        raise AMVLError(
            f"{op}: the kernels cannot be transformed by torch.func (vmap, grad, ...); use backend='torch', or pass a "
            "mapped dimension as a leading one, which needs no vmap."
        )


def first_derivatives_only(op: str) -> None:
    """Refuse a backward pass that is to be differentiated itself: the kernels' gradients would count as constants.

    Raises:
        AMVLError: where gradients are computed with `create_graph=True`, or under a transform of torch.func.
    """
    no_transforms(op)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise AMVLError(f"{op}: the kernels give first derivatives only; use backend='torch' with create_graph=True.")
