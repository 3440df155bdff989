"""Every backend on the same drawn cases, forward and backward, against the float64 formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from latent_ops import (
    INPUTS,
    NAMES,
    REGIMES,
    budget,
    device_for,
    draw,
    lacks_compiler,
    run,
    truth,
)
from torch import Tensor

import amvl_fast

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BACKENDS = [name for name in amvl_fast.ops.BACKENDS if not lacks_compiler(name)]

LAYOUTS = [
    "contiguous",
    "chunk",
    "expanded rows",
    "transposed",
    "columns outermost",
    "every other column",
    "off by one",
    "expanded columns",
]


@dataclass(frozen=True)
class Case:
    """All that a call depends on. Numbers come from `values`, so that a case stays short enough to read."""

    shape: tuple[int, ...]
    regime: str
    values: int
    dtypes: tuple[torch.dtype, ...]
    layouts: tuple[str, ...]
    upstream_layouts: tuple[str, ...]
    needed: tuple[bool, ...]
    used: tuple[bool, ...]
    stop_gradient: bool
    seed: int
    poison: tuple[int, float] | None


@st.composite
def shapes(draw_from) -> tuple[int, ...]:
    """Mostly small, as a launch of the interpreter costs by the block; now and then up to d = 8192."""
    width = draw_from(st.sampled_from(["narrow"] * 40 + ["edge"] * 8 + ["wide"]))
    if width == "narrow":
        columns, most = draw_from(st.integers(1, 20)), 16
    elif width == "edge":
        columns, most = draw_from(st.sampled_from([31, 32, 33, 64, 65, 100, 127, 128, 129, 255, 256, 257])), 3
    else:
        columns, most = draw_from(st.sampled_from([512, 513, 1000, 1024, 1025, 2048, 3001, 4096, 8191, 8192])), 1
    leading: list[int] = []
    for size in draw_from(st.lists(st.sampled_from([1, 2, 3, 5, 4, 7, 1, 2, 3, 0]), max_size=4)):
        leading.append(size if math.prod(leading) * size <= most else 1)
    return (*leading, columns)


@st.composite
def cases(draw_from) -> Case:
    kinds = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    dtypes = draw_from(st.one_of(kinds.map(lambda kind: (kind,) * 4), st.tuples(*[kinds] * 4)))
    poison = st.tuples(st.integers(0, 3), st.sampled_from([math.nan, math.inf, -math.inf]))
    layouts = st.sampled_from(LAYOUTS)
    return Case(
        shape=draw_from(shapes()),
        regime=draw_from(st.sampled_from(REGIMES)),
        values=draw_from(st.integers(0, 2**32 - 1)),
        dtypes=dtypes,
        layouts=draw_from(st.tuples(*[layouts] * 4)),
        upstream_layouts=draw_from(st.tuples(*[layouts] * 3)),
        needed=draw_from(st.tuples(*[st.booleans()] * 4)),
        used=draw_from(st.tuples(*[st.booleans()] * 3)),
        stop_gradient=draw_from(st.booleans()),
        seed=draw_from(st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from([0, -1, 2**63 - 1, -(2**63)]))),
        poison=draw_from(st.one_of(st.none(), st.none(), poison)),
    )


def arranged(x: Tensor, layout: str) -> Tensor:
    """x with other strides, and with other values where it is expanded; memory between its elements is NaN."""
    *leading, columns = x.shape
    if layout == "chunk":
        both = x.new_full((*leading, 2 * columns), math.nan)
        both[..., columns:] = x
        return both.chunk(2, -1)[1]
    if layout == "transposed":
        order = [*reversed(range(len(leading))), len(leading)]
        return x.permute(order).contiguous().permute(order)
    if layout == "columns outermost":
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "every other column":
        double = x.new_full((*leading, 2 * columns), math.nan)
        double[..., ::2] = x
        return double[..., ::2]
    if layout == "off by one":  # no longer aligned to 16 bytes
        memory = x.new_full((x.numel() + 1,), math.nan)
        memory[1:] = x.flatten()
        return memory[1:].view(x.shape)
    if layout == "expanded rows" and leading and leading[0]:
        return x[:1].contiguous().expand(x.shape)
    if layout == "expanded columns":
        return x[..., :1].contiguous().expand(x.shape)
    return x.contiguous()


def tensors(case: Case, device: torch.device) -> tuple[list[Tensor], list[Tensor | None]]:
    """The inputs of a case and the upstream gradients."""
    rng = np.random.default_rng(case.values)
    arrays = [np.array(a) for a in draw(case.regime, case.shape, rng)]
    place = int(rng.integers(max(math.prod(case.shape), 1)))
    if case.poison and arrays[0].size:
        arrays[case.poison[0]].flat[place] = case.poison[1]
    inputs = [
        arranged(torch.from_numpy(a).to(device, dtype), layout).detach().requires_grad_(needed)
        for a, dtype, layout, needed in zip(arrays, case.dtypes, case.layouts, case.needed, strict=True)
    ]
    upstream: list[Tensor | None] = []
    for size, dtype, layout, used in zip(
        (case.shape, (*case.shape[:-1], 1), (*case.shape[:-1], 1)),
        (case.dtypes[0], torch.float32, torch.float32),
        case.upstream_layouts,
        case.used,
        strict=True,
    ):
        weight = arranged(torch.from_numpy(rng.standard_normal(size)).to(device, dtype), layout)
        upstream.append((weight if size is case.shape else weight.squeeze(-1)) if used else None)
    return inputs, upstream


def check(case: Case) -> None:
    inputs, upstream = tensors(case, torch.device("cpu"))
    options = {"seed": case.seed, "stop_gradient": case.stop_gradient}
    right = truth(inputs, upstream, **options)
    # What overflows on the way to a result, even if a small weight would bring it back, has overflowed.
    heavier = [None if w is None else w.float().abs().clamp_min(1.0) for w in upstream]
    reach = truth(inputs, heavier, **options)
    bad = ~sum(t.detach().double() for t in inputs).isfinite()
    for backend in BACKENDS:
        inputs, upstream = tensors(case, device_for(backend))
        given_tensors = [t for t in (*inputs, *upstream) if t is not None]
        before = [t.detach().clone() for t in given_tensors]
        got = run(backend, inputs, upstream, **options)
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, given_tensors, strict=True))
        dtypes = [case.dtypes[0], torch.float32, torch.float32, *case.dtypes]
        for name, dtype in zip(NAMES, dtypes, strict=True):
            if name in INPUTS and not case.needed[INPUTS.index(name)]:
                assert name not in got
                continue
            assert got[name].dtype == dtype, (backend, name)
            assert got[name].shape == right[name].value.shape, (backend, name)
            touched = bad.any(-1) if name.endswith("kl") else bad
            message = mismatch(
                name,
                got[name].detach().double().cpu(),
                right[name],
                reach[name].scale,
                touched,
                budget(name, right[name], dtype, backend),
                dtype,
            )
            assert message is None, (backend, name, message)


def mismatch(name, value, right, reach, touched, allowed, dtype) -> str | None:
    """What is wrong with a result, if anything."""
    inside, outside = torch.finfo(torch.float32).max / 4, torch.finfo(dtype).max
    fits = ~touched & (reach < inside) & (right.value.abs() < outside / 2)
    error = (value - right.value).abs()
    wrong = fits & ~(error <= allowed)
    if wrong.any():
        worst = (error / allowed)[wrong].max().item()
        return f"{wrong.sum()} of {wrong.numel()} are off, by up to {worst:.3g} times what is allowed"
    # A gradient of z that passes by the poisoned element is right with or without a NaN.
    if (touched & right.value.isnan() & ~value.isnan()).any():
        return "a NaN or inf was lost"
    if (~touched & (right.value.abs() > 4 * outside) & value.isfinite() & (value.abs() < outside / 2)).any():
        return "an overflow was lost"
    return None


def fuzz(examples: int, *, derandomize: bool) -> None:
    """Fails on any mismatch, or if fewer cases were tried than asked for."""
    tried = 0

    @settings(
        max_examples=examples,
        derandomize=derandomize,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def every_backend_agrees(case: Case) -> None:
        nonlocal tried
        tried += 1
        check(case)

    every_backend_agrees()
    assert tried >= examples


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy, where cases overflow
def test_two_thousand_cases():
    fuzz(2000, derandomize=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_five_thousand_cases_new_each_time():
    fuzz(5000, derandomize=False)
