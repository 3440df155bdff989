"""Which calls of the launchers the compile report looks at."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import amvl_fast.kernels.triton as kernels

PURE_DTYPES = ("float32", "bfloat16", "float16")

# The dtypes of mean_q, logvar_q, mean_p and logvar_p; `mean, logvar` of sample_gaussian are the first two.
DTYPES = {name: (getattr(torch, name),) * 4 for name in PURE_DTYPES} | {
    "bfloat16 mean, float32 logvar": (torch.bfloat16, torch.float32) * 2,
    "float32 q, bfloat16 p": (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16),
}
# And every other mixture.
MIXED_DTYPES = {
    ", ".join(names): tuple(getattr(torch, name) for name in names)
    for names in itertools.product(PURE_DTYPES, repeat=4)
    if tuple(getattr(torch, name) for name in names) not in DTYPES.values()
}

# Blocks of several rows, exact blocks, blocks with a masked tail, and rows cut into pieces, even and uneven. The rule
# for blocks knows no others; widths between these differ in constants only, and are left out.
WIDTHS = (1, 7, 64, 100, 512, 600, 1000, 1029, 2048, 3000, 8192)
COMMON_WIDTHS = (64, 512, 2048)

LAYOUTS = (
    "contiguous",
    "chunked",
    "expanded",
    "transposed",
    "heads",
    "offset",
    "odd rows",
    "strided",
    "constant",
    "int64",
    "int64 rows",
)
OPS = (
    "gaussian_dual_kl_forward",
    "gaussian_dual_kl_backward",
    "sample_gaussian_forward",
    "sample_gaussian_backward",
    "gaussian_noise",
)

ALL_UPSTREAM = ("z", "forward_kl", "reverse_kl")
ALL_NEEDED = ("mean_q", "logvar_q", "mean_p", "logvar_p")


@dataclass(frozen=True)
class Case:
    """One call of one launcher.

    Attributes:
        op: one of `OPS`.
        dtypes: a key of `DTYPES` or `MIXED_DTYPES`.
        width: d, the latent dimension.
        layout: one of `LAYOUTS`: how the inputs and upstream gradients lie in memory.
        leading: the leading dimensions, two.
        upstream: the gradients that arrive, of `ALL_UPSTREAM`; like the next two for gaussian_dual_kl_backward only.
        needed: the inputs whose gradient is asked for, of `ALL_NEEDED`.
        stop_gradient: the op's option.
        sample_ids: whether the noise follows numbers of samples.
    """

    op: str
    dtypes: str = "float32"
    width: int = 512
    layout: str = "contiguous"
    leading: tuple[int, int] = (4, 8)
    upstream: tuple[str, ...] = ALL_UPSTREAM
    needed: tuple[str, ...] = ALL_NEEDED
    stop_gradient: bool = True
    sample_ids: bool = False

    @property
    def options(self) -> str:
        """What departs from the defaults, for people; empty if nothing does."""
        words = []
        if self.upstream != ALL_UPSTREAM:
            words.append("from " + "+".join(self.upstream))
        if self.needed != ALL_NEEDED:
            words.append("to " + "+".join(self.needed))
        if not self.stop_gradient:
            words.append("no stop")
        if self.sample_ids:
            words.append("sample ids")
        return ", ".join(words)

    def input(self, dtype: torch.dtype, device: str, expandable: bool = False, half: int = 0) -> Tensor:
        """A `[..., d]` tensor in the case's layout; an expandable one is a prior that the batch shares."""
        (batch, slots), width = self.leading, self.width

        def empty(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        if self.layout == "chunked":
            return empty(batch, slots, 2 * width).chunk(2, -1)[half]
        if self.layout == "expanded" and expandable:
            return empty(1, slots, width).expand(batch, slots, width)
        if self.layout == "transposed":
            return empty(slots, batch, width).transpose(0, 1)
        if self.layout == "heads":  # [batch, slots, heads, d] with slots and heads exchanged: three dimensions are left
            return empty(batch, slots // 2, 2, width).transpose(1, 2)
        if self.layout == "offset":
            return empty(batch * slots * width + 1)[1:].view(batch, slots, width)
        if self.layout == "odd rows":
            return empty(batch, slots, width + 1)[..., :width]
        if self.layout == "strided":
            return empty(batch, slots, 2 * width)[..., ::2]
        if self.layout == "int64":  # offsets of more than 32 bits ...
            return empty(2**28 // width + 1, 8, width)
        if self.layout == "int64 rows":  # ... and row numbers, too
            return empty(2**28, 8, width)
        return empty(batch, slots, width)

    def launch(self, device: str = "meta") -> tuple[bool, int]:
        """Call the launcher, on zeros.

        Returns:
            Whether 16-byte accesses are possible throughout, that is, whether the rows of all tensors begin at
            multiples of 16 bytes and their columns lie side by side; and the number of latent elements.
        """
        dtypes = (DTYPES | MIXED_DTYPES)[self.dtypes]
        seed = torch.zeros(1, dtype=torch.int64, device=device)
        read = [self.input(dtype, device, i >= 2, i % 2) for i, dtype in enumerate(dtypes)]
        shape = read[0].shape
        like = [torch.zeros(shape, dtype=dtype, device=device) for dtype in dtypes]  # outputs are contiguous
        z, written = like[0], [like[0]]
        ids = torch.zeros(shape[0], dtype=torch.int64, device=device) if self.sample_ids else None
        kl = [torch.zeros(shape[:-1], device=device) for _ in range(2)]
        grad_z, weights = self.input(z.dtype, device), kl
        if self.layout == "constant":  # what z.sum() and kl.mean() send back
            grad_z = torch.zeros((), dtype=z.dtype, device=device).expand(shape)
            weights = [torch.zeros((), device=device).expand(shape[:-1]) for _ in kl]
        if self.op == "gaussian_dual_kl_forward":
            kernels.gaussian_dual_kl_forward(*read, seed, ids, z, *kl)
        elif self.op == "gaussian_dual_kl_backward":
            grads = [tensor if name in self.needed else None for name, tensor in zip(ALL_NEEDED, like, strict=True)]
            upstream = zip(ALL_UPSTREAM, [grad_z, *weights], strict=True)
            arrived = [tensor if name in self.upstream else None for name, tensor in upstream]
            kernels.gaussian_dual_kl_backward(*read, seed, ids, *arrived, *grads, stop_gradient=self.stop_gradient)
            read = [*read, grad_z] if "z" in self.upstream else read
            written = [tensor for tensor in grads if tensor is not None]
        elif self.op == "sample_gaussian_forward":
            read = read[:2]
            kernels.sample_gaussian_forward(*read, seed, ids, 0.7, 0, z)
        elif self.op == "sample_gaussian_backward":
            read, written = [grad_z, read[1]], [like[1]]
            kernels.sample_gaussian_backward(grad_z, read[1], seed, ids, 0.7, 0, like[1])
        else:
            read, written = [], [torch.zeros(shape, device=device)]
            kernels.gaussian_noise(written[0], seed, ids, 0)
        return all(rows_at_16_bytes(tensor) for tensor in [*read, *written]), math.prod(shape)


def rows_at_16_bytes(tensor: Tensor) -> bool:
    """Whether hardware could read the tensor's rows in whole units of 16 bytes."""
    starts = [tensor.data_ptr()]
    starts += [stride * tensor.itemsize for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    side_by_side = tensor.stride(-1) == 1 and tensor.shape[-1] * tensor.itemsize % 16 == 0
    return side_by_side and all(start % 16 == 0 for start in starts[:-1])


def common_cases(wide: bool = True) -> Iterator[Case]:
    """What is launched most: three dtypes, three widths, every kernel; unless wide the minor kernels at one width."""
    for op, dtypes, width in itertools.product(OPS, PURE_DTYPES, COMMON_WIDTHS):
        if wide or op.startswith("gaussian_dual_kl") or width == 512:
            yield Case(op, dtypes, width)
    yield from (Case(op, "bfloat16", 512, sample_ids=True) for op in OPS[:2])  # as in training


def broad_cases() -> Iterator[Case]:
    """Every value of every choice, but few combinations: few of `all_cases`, for CI."""
    yield from common_cases(wide=False)
    for op, dtypes, width in itertools.product(OPS[:2], DTYPES, WIDTHS):
        if dtypes == "bfloat16" or (dtypes == "float32" and width in (7, 100, 1029, 8192)) or width == 512:
            yield Case(op, dtypes, width)
    for op, layout in itertools.product(OPS[:4], LAYOUTS):
        if op.startswith("gaussian_dual_kl") or layout in ("chunked", "odd rows", "int64"):
            yield Case(op, "bfloat16", 512, layout)
    yield from option_cases("bfloat16", 512, few=True)
    yield from sample_id_cases(few=True)
    yield from (Case(op, "bfloat16", width) for op in OPS[2:] for width in (7, 100, 2048, 3000))


def all_cases() -> Iterator[Case]:
    """Dtypes x widths x layouts, but some layouts of rarer dtypes; all mixtures and options at one shape."""
    for op, dtypes, width, layout in itertools.product(OPS, DTYPES, WIDTHS, LAYOUTS):
        if dtypes in ("float32", "bfloat16") or width == 512 or layout == "contiguous":
            yield Case(op, dtypes, width, layout)
    yield from (Case(op, dtypes) for op in OPS[:4] for dtypes in MIXED_DTYPES)
    yield from option_cases("bfloat16", 512)
    yield from option_cases("float32", 512, few=True)
    yield from option_cases("bfloat16", 7, few=True)
    yield from sample_id_cases()
    for op in OPS:
        yield Case(op, "bfloat16", 512, leading=(4096, 8))


def sample_id_cases(few: bool = False) -> Iterator[Case]:
    """With sample ids, which concern rows alone, all kernels, but few of the combinations above."""
    for op, dtypes, width in itertools.product(OPS, PURE_DTYPES[:2], COMMON_WIDTHS if few else WIDTHS):
        if not few or op.startswith("gaussian_dual_kl") or width == 512:
            yield Case(op, dtypes, width, sample_ids=True)
    for op, layout in itertools.product(OPS[:2], ("expanded", "int64 rows") if few else LAYOUTS):
        yield Case(op, "bfloat16", 512, layout, sample_ids=True)


def option_cases(dtypes: str, width: int, few: bool = False) -> Iterator[Case]:
    """The backward's options: subsets of upstream gradients x subsets of asked ones x stop_gradient."""

    def subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
        return [some for n in range(1, len(names) + 1) for some in itertools.combinations(names, n)]

    halves = (ALL_NEEDED[:2], ALL_NEEDED[2:])
    for upstream, needed, stop in itertools.product(subsets(ALL_UPSTREAM), subsets(ALL_NEEDED), (True, False)):
        usual = upstream == ALL_UPSTREAM and (needed in halves or len(needed) == 1) or needed == ALL_NEEDED
        if usual or not few:
            yield Case("gaussian_dual_kl_backward", dtypes, width, upstream=upstream, needed=needed, stop_gradient=stop)
