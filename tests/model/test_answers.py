"""The loss of answer rows: the same as all logits at once, without keeping them."""

import pytest
import torch
from torch import nn

from amvl_fast import answers

ROWS, HIDDEN, VOCABULARY = 7, 16, 50


@pytest.fixture
def case():
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, requires_grad=True)
    return nn.Linear(HIDDEN, VOCABULARY, bias=False), hidden, torch.randint(VOCABULARY, (ROWS,)), torch.rand(ROWS)


def losses_and_gradients(nll, head, hidden, targets, weights):
    loss = nll(head, hidden, targets)
    return [loss, *torch.autograd.grad(loss, [hidden, head.weight], weights)]


def at_once(head, hidden, targets):
    return nn.functional.cross_entropy(head(hidden), targets, reduction="none")


def fused(head, hidden, targets):
    return answers.fused_nll()(head.weight, hidden, targets, head.bias)


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_chunks_change_nothing(monkeypatch, case, rows):
    monkeypatch.setattr(answers, "CHUNK", rows * VOCABULARY)
    for got, right in zip(
        losses_and_gradients(answers.token_nll, *case), losses_and_gradients(at_once, *case), strict=True
    ):
        torch.testing.assert_close(got, right)


def test_ligers_kernel_gives_each_token_its_weight(case):
    """On the CPU under Triton's interpreter; `token_nll` takes it on CUDA."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    head, hidden, targets, weights = (part.to(device) for part in case)
    case = head, hidden.detach().requires_grad_(), targets, weights
    for got, right in zip(losses_and_gradients(fused, *case), losses_and_gradients(at_once, *case), strict=True):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize("nll", [answers.token_nll, at_once])
def test_no_logits_are_kept(case, nll):
    head, hidden, targets, _ = case
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        nll(head, hidden, targets)
    assert any(shape[-1:] == (VOCABULARY,) for shape in kept) == (nll is at_once)


def test_bfloat16_losses_are_float32(case):
    head, hidden, targets, _ = case
    loss = answers.token_nll(head.bfloat16(), hidden.bfloat16(), targets)
    assert loss.dtype == torch.float32
