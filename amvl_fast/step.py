"""The AMVL step: the prompt runs once, and short branches read its keys and values.

    prior      x | s             reads the prompt alone
    posterior  x | y, s          reads the answer too
    decode     x | E(z), end, y  predicts the answer from the prompt and a latent

Prior and posterior do not need each other, nor do the samples that are decoded: two calls of the decoder after the
prompt's, whatever is asked for. `amvl_fast.reference.three_pass` is the same step in its plain form.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from amvl_fast.answers import token_nll
from amvl_fast.backbones import Adapter
from amvl_fast.latents import Gaussian, Latents
from amvl_fast.ops import gaussian_dual_kl, sample_gaussian
from amvl_fast.prefix import Branch, Prefix
from amvl_fast.samples import POSTERIOR_STREAM, PRIOR_STREAM, AnswerNLL, Branches, Samples


class Answers(NamedTuple):
    """The answers of a batch without what stands around them, padded at the left or at the right.

    Attributes:
        embeds: ``(batch, rows, hidden_size)``.
        labels: ``(batch, rows)`` int64.
        mask: ``(batch, rows)`` bool, False on padding.
    """

    embeds: Tensor
    labels: Tensor
    mask: Tensor

    @classmethod
    def of(cls, samples: Samples, *, at_the_right: bool) -> Answers:
        rows = int(samples.answer.sum(1).max())
        order = samples.answer if at_the_right else ~samples.answer
        index = order.to(torch.int8).argsort(dim=1, stable=True)
        index = index[:, -rows:] if at_the_right else index[:, :rows]
        return cls(
            samples.embeds.take_along_dim(index[..., None], dim=1),
            samples.labels.take_along_dim(index, dim=1),
            samples.answer.take_along_dim(index, dim=1),
        )


def shared_prefix(
    adapter: Adapter,
    latents: Latents,
    samples: Samples,
    seeds: list[Tensor],
    *,
    sample_ids: Tensor | None = None,
    decode_prior: bool = False,
    stop_gradient: bool = True,
    padding_free: bool = False,
) -> Branches:
    """One AMVL step (arXiv 2607.00461).

    Args:
        adapter: of the backbone, see `amvl_fast.backbones`.
        latents: slots, heads and projection.
        samples: the batch.
        seeds: one-element int64 tensors, one for each sample of the posterior.
        sample_ids: ``(batch,)`` int64, whose noise it is; None means places in the batch.
        decode_prior: decode the answer from a sample of the prior, too; by the first seed.
        stop_gradient: each KL moves one side only; False lets both flow both ways (the plain ELBO).
        padding_free: pack prompts of different lengths into one row; for flash attention.
    """
    prefix = Prefix.of(
        adapter, samples.embeds, samples.positions, samples.prompt, samples.extras, padding_free=padding_free
    )
    slots, seen = _slots(latents, samples), Answers.of(samples, at_the_right=True)
    mask = torch.cat([seen.mask, seen.mask.new_ones(slots.shape[:2])], dim=1)
    after_answer = Branch(torch.cat([seen.embeds, slots], dim=1), mask)
    prior_states, posterior_states = prefix.run([Branch(slots), after_answer])
    prior, posterior = latents.prior_head(prior_states), latents.posterior_head(posterior_states[:, -slots.shape[1] :])

    first, *rest = seeds
    z, forward_kl, reverse_kl = gaussian_dual_kl(
        *posterior, *prior, seed=first, sample_ids=sample_ids, stop_gradient=stop_gradient
    )
    sample = partial(sample_gaussian, sample_ids=sample_ids)
    z = torch.stack([z, *(sample(*posterior, seed=seed, stream=POSTERIOR_STREAM) for seed in rest)])
    from_prior = [sample(*prior, seed=first, stream=PRIOR_STREAM)] if decode_prior else []
    totals, tokens = _decode(adapter, prefix, latents, samples, [*z, *from_prior])
    prior_nll = AnswerNLL(totals[-1], tokens) if decode_prior else None
    return Branches(posterior, prior, z, forward_kl, reverse_kl, AnswerNLL(totals[: len(z)], tokens), prior_nll)


def importance_bound(step: Branches) -> AnswerNLL:
    """``-log mean_s p(y|x,z_s) p(z_s|x) / q(z_s|x,y)`` for each sample of the batch (Burda et al. 2016)."""
    log_ratio = _log_density(step.z, step.prior) - _log_density(step.z, step.posterior)
    log_weights = log_ratio - step.nll.total
    return AnswerNLL(math.log(len(log_weights)) - log_weights.logsumexp(0), step.nll.tokens)


def _log_density(z: Tensor, gaussian: Gaussian) -> Tensor:
    """``(..., batch)``, summed over slots and dimensions, without the constant that all Gaussians share."""
    gap = (z - gaussian.mean) * (gaussian.logvar / -2).exp()
    return -0.5 * (gaussian.logvar + gap.square()).sum((-2, -1))


def _slots(latents: Latents, samples: Samples) -> Tensor:
    return latents.slots.to(samples.embeds.dtype).expand(len(samples.embeds), -1, -1)


def _decode(
    adapter: Adapter, prefix: Prefix, latents: Latents, samples: Samples, latent: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Nats of the answer in ``x | E(z), end, y`` for each `z`, ``(samples, batch)``, and the tokens of each answer."""
    answers = Answers.of(samples, at_the_right=False)
    end = latents.end.to(samples.embeds.dtype).expand(len(samples.embeds), -1, -1)
    before = len(latents.slots) + len(latents.end)
    mask = torch.cat([answers.mask.new_ones(len(answers.mask), before), answers.mask], dim=1)
    branches = [
        Branch(torch.cat([latents.projection(z).to(end.dtype), end, answers.embeds], dim=1), mask) for z in latent
    ]
    # Each row predicts the token after it.
    predicting = torch.stack([states[:, before - 1 : -1] for states in prefix.run(branches)])
    mask = answers.mask.expand(len(latent), -1, -1)
    nll = token_nll(adapter.head, predicting[mask], answers.labels.expand_as(mask)[mask])
    totals = torch.zeros(mask.shape, dtype=nll.dtype, device=nll.device).masked_scatter(mask, nll).sum(-1)
    return totals, answers.mask.sum(1)
