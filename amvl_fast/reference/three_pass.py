"""The AMVL step in its plain form: every branch runs the whole prompt again. Slow, and easy to see to be right.

prior      [x, s]            reads the prompt alone
posterior  [x, y, s]         reads the answer too
decode     [x, E(z), end, y] predicts the answer from the prompt and a latent
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from amvl_fast.backbones import Adapter
from amvl_fast.latents import Latents
from amvl_fast.reference.gaussian import gaussian_dual_kl
from amvl_fast.samples import AnswerNLL, Branches, Samples, pad_rows, with_prompt


def run(adapter: Adapter, samples: Samples, rows: list[Tensor]) -> list[Tensor]:
    """Run the decoder over each sample's prompt and `rows`; final hidden states, unpadded."""
    whole = with_prompt(samples, rows)
    hidden = adapter.decode(*pad_rows(whole, "right"))
    return [hidden[i, : len(row.embeds)] for i, row in enumerate(whole)]


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
        logits = adapter.head(predicting)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        totals.append(nn.functional.cross_entropy(logits, targets, reduction="sum"))
        tokens.append(targets.numel())
    return AnswerNLL(torch.stack(totals), torch.tensor(tokens, device=z.device))


def three_pass(
    adapter: Adapter,
    latents: Latents,
    samples: Samples,
    noise: Sequence[Tensor],
    prior_noise: Tensor | None = None,
    *,
    stop_gradient: bool = True,
) -> Branches:
    """One AMVL step, each branch a run of its own (arXiv 2607.00461, and the paper's order of reading).

    Args:
        adapter: of the backbone, see `amvl_fast.backbones`.
        latents: slots, heads and projection.
        samples: the batch.
        noise: ``(batch, k, d)`` standard normal, for each sample of the posterior.
        prior_noise: the same for a prior sample; None leaves the prior's decode branch out.
        stop_gradient: each KL moves one side only; False lets both flow both ways (the plain ELBO).
    """
    prior = latents.prior_head(slot_states(adapter, latents, samples, see_answer=False))
    posterior = latents.posterior_head(slot_states(adapter, latents, samples, see_answer=True))
    means_and_logvars = (posterior.mean, posterior.logvar, prior.mean, prior.logvar)
    kls = [gaussian_dual_kl(*means_and_logvars, one, stop_gradient=stop_gradient) for one in noise]
    z = torch.stack([kl.z for kl in kls])
    prior_nll = None
    if prior_noise is not None:
        prior_z = prior.mean + (prior.logvar / 2).exp() * prior_noise.to(prior.mean.dtype)
        prior_nll = decode(adapter, latents, samples, prior_z)
    decoded = [decode(adapter, latents, samples, one) for one in z]
    nll = AnswerNLL(torch.stack([one.total for one in decoded]), decoded[0].tokens)
    return Branches(posterior, prior, z, kls[0].forward_kl, kls[0].reverse_kl, nll, prior_nll)
