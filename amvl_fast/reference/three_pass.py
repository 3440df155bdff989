"""The AMVL step in its plain form: every branch runs the whole prompt again. Slow, and easy to see to be right.

prior      [x, s]            reads the prompt alone
posterior  [x, y, s]         reads the answer too
decode     [x, E(z), end, y] predicts the answer from the prompt and a latent
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from amvl_fast.backbones import Adapter
from amvl_fast.latents import Gaussian, Latents
from amvl_fast.reference.gaussian import gaussian_dual_kl
from amvl_fast.samples import AnswerNLL, Samples


class Branches(NamedTuple):
    """What one step computes, before it is weighed into a loss.

    Attributes:
        posterior, prior: `Gaussian`, ``(batch, k, d)`` each.
        z: ``(batch, k, d)``, the posterior's sample.
        forward_kl, reverse_kl: ``(batch, k)`` float32: KL(q || p) and KL(p || q), q the posterior, summed over d.
        nll: `AnswerNLL` of the answer decoded from `z`.
        prior_nll: `AnswerNLL` of the answer decoded from a sample of the prior, if that was asked for.
    """

    posterior: Gaussian
    prior: Gaussian
    z: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor
    nll: AnswerNLL
    prior_nll: AnswerNLL | None


def with_prompt(samples: Samples, rows: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Each sample's prompt followed by its own `rows` of embeddings, unpadded: ``(n, hidden_size)``, ``(axes, n)``.

    Rows after the prompt take the text positions that follow the prompt's largest, whatever the rotary scheme.
    """
    embeds, positions = [], []
    for i, extra in enumerate(rows):
        mask = samples.prompt[i]
        embeds.append(torch.cat([samples.embeds[i, mask], extra]))
        before = samples.positions[:, i, mask]
        after = before.max() + 1 + torch.arange(len(extra), device=extra.device)
        positions.append(torch.cat([before, after.expand(len(before), -1)], dim=1))
    return embeds, positions


def run(adapter: Adapter, samples: Samples, rows: list[Tensor]) -> list[Tensor]:
    """Run the decoder over each sample's prompt and `rows`; final hidden states, unpadded."""
    embeds, positions = with_prompt(samples, rows)
    ones = [torch.ones(len(e), dtype=torch.long, device=e.device) for e in embeds]
    hidden = adapter.decode(
        pad_sequence(embeds, batch_first=True),
        pad_sequence(ones, batch_first=True),
        pad_sequence([p.T for p in positions], batch_first=True).permute(2, 0, 1),
    )
    return [hidden[i, : len(e)] for i, e in enumerate(embeds)]


def slot_states(adapter: Adapter, latents: Latents, samples: Samples, *, see_answer: bool) -> Tensor:
    """Final hidden states at the slots, ``(batch, k, hidden_size)``: after ``[x, y]`` or after ``[x]`` alone."""
    slots = latents.slots.to(samples.embeds.dtype)
    seen = samples.answer if see_answer else torch.zeros_like(samples.answer)
    rows = [torch.cat([samples.embeds[i, seen[i]], slots]) for i in range(len(seen))]
    return torch.stack([hidden[-len(slots) :] for hidden in run(adapter, samples, rows)])


def decode(adapter: Adapter, latents: Latents, samples: Samples, z: Tensor) -> AnswerNLL:
    """Negative log-likelihood of the answer in ``[x, E(z), end, y]``; `z` is ``(batch, k, d)``."""
    lead = latents.projection(z).to(samples.embeds.dtype)
    end = latents.end.to(samples.embeds.dtype)
    rows = [torch.cat([lead[i], end, samples.embeds[i, samples.answer[i]]]) for i in range(len(z))]
    totals, tokens = [], []
    for i, hidden in enumerate(run(adapter, samples, rows)):
        targets = samples.labels[i, samples.answer[i]]
        predicting = hidden[-len(targets) - 1 : -1]  # each row predicts the token after it
        logits = adapter.logits(predicting)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        totals.append(nn.functional.cross_entropy(logits, targets, reduction="sum"))
        tokens.append(targets.numel())
    return AnswerNLL(torch.stack(totals), torch.tensor(tokens, device=z.device))


def three_pass(
    adapter: Adapter,
    latents: Latents,
    samples: Samples,
    noise: Tensor,
    prior_noise: Tensor | None = None,
    *,
    stop_gradient: bool = True,
) -> Branches:
    """One AMVL step, each branch a run of its own (arXiv 2607.00461, and the paper's order of reading).

    Args:
        adapter: of the backbone, see `amvl_fast.backbones`.
        latents: slots, heads and projection.
        samples: the batch.
        noise: ``(batch, k, d)`` standard normal, makes `z` from the posterior.
        prior_noise: the same for a prior sample; None leaves the prior's decode branch out.
        stop_gradient: each KL moves one side only; False lets both flow both ways (the plain ELBO).
    """
    prior = latents.prior_head(slot_states(adapter, latents, samples, see_answer=False))
    posterior = latents.posterior_head(slot_states(adapter, latents, samples, see_answer=True))
    z, forward_kl, reverse_kl = gaussian_dual_kl(
        posterior.mean, posterior.logvar, prior.mean, prior.logvar, noise, stop_gradient=stop_gradient
    )
    prior_nll = None
    if prior_noise is not None:
        prior_z = prior.mean + (prior.logvar / 2).exp() * prior_noise.to(prior.mean.dtype)
        prior_nll = decode(adapter, latents, samples, prior_z)
    return Branches(posterior, prior, z, forward_kl, reverse_kl, decode(adapter, latents, samples, z), prior_nll)
