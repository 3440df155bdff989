"""Every backend on the same drawn cases, forward and backward, against the float64 formulas.

A NaN or inf in an input makes NaN of that element of z and of both KLs of its row. What gradients become in such a
row is left open; all other rows must be right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from latent_ops import (
    INPUTS,
    NAMES,
    REGIMES,
    Truth,
    budget,
    closed_form,
    device_for,
    draw,
    lacks_compiler,
    numpy_normals,
    run,
    true_noise,
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
    width = draw_from(st.integers(0, 99))
    if width < 85:
        columns, most = draw_from(st.integers(1, 20)), 16
    elif width < 98:
        columns, most = draw_from(st.sampled_from([31, 32, 33, 64, 65, 100, 127, 128, 129, 255, 256, 257])), 3
    else:
        columns, most = draw_from(st.sampled_from([512, 513, 1000, 1024, 1025, 2048, 3001, 4096, 8191, 8192])), 1
    leading: list[int] = []
    for size in draw_from(st.lists(st.sampled_from([1, 2, 3, 5, 4, 7, 1, 2, 3, 0]), max_size=4)):
        leading.append(size if math.prod(leading) * size <= most else 1)
    return (*leading, columns)


kinds = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
layouts = st.sampled_from(LAYOUTS)
numbers = st.integers(0, 2**32 - 1)
seeds = st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from([0, -1, 2**63 - 1, -(2**63)]))


@st.composite
def cases(draw_from) -> Case:
    dtypes = draw_from(st.one_of(kinds.map(lambda kind: (kind,) * 4), st.tuples(*[kinds] * 4)))
    poison = st.tuples(st.integers(0, 3), st.sampled_from([math.nan, math.inf, -math.inf]))
    return Case(
        shape=draw_from(shapes()),
        regime=draw_from(st.sampled_from(REGIMES)),
        values=draw_from(numbers),
        dtypes=dtypes,
        layouts=draw_from(st.tuples(*[layouts] * 4)),
        upstream_layouts=draw_from(st.tuples(*[layouts] * 3)),
        needed=draw_from(st.tuples(*[st.booleans()] * 4)),
        used=draw_from(st.tuples(*[st.booleans()] * 3)),
        stop_gradient=draw_from(st.booleans()),
        seed=draw_from(seeds),
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
    """One case on every backend. The truth is found once, from numbers that do not depend on the backend."""
    inputs, upstream = tensors(case, torch.device("cpu"))
    noise = true_noise(case.shape, case.seed)
    right = closed_form(inputs, noise, upstream, case.stop_gradient)
    # What overflows on the way to a result, even if a small weight would bring it back, has overflowed.
    heavier = [None if w is None else w.float().abs().clamp_min(1.0) for w in upstream]
    reach = closed_form(inputs, noise, heavier, case.stop_gradient)
    bad = ~sum(t.detach().double() for t in inputs).isfinite()
    bad_row = bad.any(-1)
    for backend in BACKENDS:
        inputs, upstream = tensors(case, device_for(backend))
        given_tensors = [t for t in (*inputs, *upstream) if t is not None]
        before = [t.detach().clone() for t in given_tensors]
        got = run(backend, inputs, upstream, seed=case.seed, stop_gradient=case.stop_gradient)
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, given_tensors, strict=True))
        dtypes = [case.dtypes[0], torch.float32, torch.float32, *case.dtypes]
        for name, dtype in zip(NAMES, dtypes, strict=True):
            if name in INPUTS and not case.needed[INPUTS.index(name)]:
                assert name not in got
                continue
            value = got[name].detach().double().cpu()
            assert got[name].dtype == dtype, (backend, name)
            assert value.shape == right[name].value.shape, (backend, name)
            if name in INPUTS:
                compared = ~bad_row.unsqueeze(-1).expand_as(bad)
            else:
                hit = bad if name == "z" else bad_row
                assert value[hit].isnan().all(), (backend, name, "a NaN or inf was lost")
                compared = ~hit
            allowed = budget(name, right[name], dtype, backend)
            message = mismatch(value, right[name].value, reach[name].scale, compared, allowed, dtype)
            assert message is None, (backend, name, message)


def mismatch(value, right, reach, compared, allowed, dtype) -> str | None:
    """What is wrong with the compared elements of a result, if anything."""
    inside, outside = torch.finfo(torch.float32).max / 4, torch.finfo(dtype).max
    fits = compared & (reach < inside) & (right.abs() < outside / 2)
    error = (value - right).abs()
    wrong = fits & ~(error <= allowed)
    if wrong.any():
        worst = (error / allowed)[wrong].max().item()
        return f"{wrong.sum()} of {wrong.numel()} are off, by up to {worst:.3g} times what is allowed"
    if (compared & (right.abs() > 4 * outside) & value.isfinite() & (value.abs() < outside / 2)).any():
        return "an overflow was lost"
    return None


@st.composite
def sampling_cases(draw_from) -> dict:
    return {
        "shape": draw_from(shapes()),
        "regime": draw_from(st.sampled_from(REGIMES)),
        "values": draw_from(numbers),
        "dtypes": draw_from(st.tuples(kinds, kinds)),
        "layouts": draw_from(st.tuples(*[layouts] * 3)),
        "needed": draw_from(st.sampled_from([(True, True), (True, False), (False, True), (False, False)])),
        "temperature": draw_from(st.one_of(st.floats(1e-3, 10.0), st.sampled_from([0, 1, 1.0, 0.5]))),
        "seed": draw_from(seeds),
        "stream": draw_from(st.one_of(numbers, st.sampled_from([0, 1, 2**31, 2**32 - 1]))),
        "seed_form": draw_from(st.sampled_from([None, (), (1,), (1, 1)])),
    }


def seed_in(case: dict, device: torch.device) -> int | Tensor:
    """The seed as a number, or as a tensor of the case's shape."""
    if case["seed_form"] is None:
        return case["seed"]
    return torch.full(case["seed_form"], case["seed"], dtype=torch.int64, device=device)


def check_sampling(case: dict) -> None:
    """`sample_gaussian` and its gradients, on every backend."""
    shape, temperature = case["shape"], case["temperature"]
    options = {"temperature": temperature, "stream": case["stream"]}
    rng = np.random.default_rng(case["values"])
    arrays = [*draw(case["regime"], shape, rng)[:2], rng.standard_normal(shape)]
    for backend in BACKENDS:
        device = device_for(backend)
        mean, logvar, upstream = (
            arranged(torch.from_numpy(np.array(a)).to(device, dtype), layout)
            for a, dtype, layout in zip(arrays, (*case["dtypes"], case["dtypes"][0]), case["layouts"], strict=True)
        )
        mean, logvar = (t.detach().requires_grad_(n) for t, n in zip((mean, logvar), case["needed"], strict=True))
        z = amvl_fast.sample_gaussian(mean, logvar, seed=seed_in(case, device), backend=backend, **options)
        asking = [t for t in (mean, logvar) if t.requires_grad]
        grads = iter([torch.zeros_like(t) for t in asking])
        if z.requires_grad:
            grads = iter(torch.autograd.grad(z, asking, upstream, materialize_grads=True))
        assert z.requires_grad == (mean.requires_grad or (logvar.requires_grad and temperature != 0))

        m, v, g = (t.detach().cpu().double() for t in (mean, logvar, upstream))
        sample = temperature * torch.exp(v / 2) * true_noise(shape, case["seed"], case["stream"])
        results = [("z", z, [m, sample])]
        for name, leaf, terms in (("mean", mean, [g]), ("logvar", logvar, [g * sample / 2])):
            if leaf.requires_grad:
                results.append((name, next(grads), terms))
        for name, got, terms in results:
            right = Truth(sum(terms), sum(t.abs() for t in terms), torch.zeros_like(g))
            dtype = case["dtypes"][name == "logvar"]
            assert (got.dtype, got.shape) == (dtype, shape), (backend, name)
            value, allowed = got.detach().cpu().double(), budget("z", right, dtype, backend)
            everywhere = torch.ones(shape, dtype=torch.bool)
            message = mismatch(value, right.value, right.scale, everywhere, allowed, dtype)
            assert message is None, (backend, name, message)


def check_noise(case: dict) -> None:
    """`gaussian_noise` against its definition, each normal relative to its own size."""
    shape = case["shape"]
    right = numpy_normals(np.arange(math.prod(shape[:-1])), shape[-1], case["seed"], case["stream"]).reshape(shape)
    for backend in BACKENDS:
        device = device_for(backend)
        options = {"device": device, "backend": backend, "stream": case["stream"]}
        noise = amvl_fast.gaussian_noise(shape, seed_in(case, device), **options)
        assert noise.dtype == torch.float32
        np.testing.assert_allclose(noise.cpu().numpy(), right, rtol=6e-7, atol=0, err_msg=backend)


def fuzz(check, strategy, examples: int, *, derandomize: bool) -> None:
    """Fails on any mismatch, or if fewer cases were tried than asked for."""
    tried = 0

    @settings(
        max_examples=examples,
        derandomize=derandomize,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        # Not Phase.explain, which takes minutes under the interpreter.
        phases=[Phase.generate, Phase.shrink],
    )
    @given(strategy)
    def every_backend_agrees(case) -> None:
        nonlocal tried
        tried += 1
        check(case)

    every_backend_agrees()
    assert tried >= examples


# The same cases in every run.
def test_two_thousand_cases():
    fuzz(check, cases(), 2000, derandomize=True)


def test_four_hundred_cases_of_sampling():
    fuzz(check_sampling, sampling_cases(), 400, derandomize=True)


def test_four_hundred_cases_of_noise():
    fuzz(check_noise, sampling_cases(), 400, derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "strategy", "examples"),
    [(check, cases(), 2000), (check_sampling, sampling_cases(), 1000), (check_noise, sampling_cases(), 1000)],
    ids=["gaussian_dual_kl", "sample_gaussian", "gaussian_noise"],
)
def test_cases_new_each_time(check, strategy, examples):
    fuzz(check, strategy, examples, derandomize=False)
