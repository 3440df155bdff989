"""The trainable parts that AMVL adds to a backbone: slots, Gaussian heads, and the way from a latent to an embedding.

The paper publishes neither the shape of the heads, nor the bound on the log-variance, nor the map from latents to
embeddings: all three are our choice.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from amvl_fast.configuration import AMVLConfig

# How far the slots start from one another, as a share of the token embeddings' root mean square.
SLOT_SPREAD = 0.3


class Gaussian(NamedTuple):
    """A diagonal Gaussian over the latents: `mean` and `logvar`, both ``(batch, num_latents, latent_dim)``."""

    mean: Tensor
    logvar: Tensor


class GaussianHead(nn.Module):
    """Final hidden states at the slots ``(batch, k, hidden_size)`` -> `Gaussian`, in float32 or wider.

    One linear map gives mean and raw log-variance; a scaled sigmoid bounds the latter:
    ``logvar = low + (high - low) * sigmoid(raw)``. The initial bias places it at `logvar_init`.
    """

    def __init__(self, hidden_size: int, latent_dim: int, low: float, high: float, start: float) -> None:
        super().__init__()
        self.low, self.high, self.start = low, high, start
        self.linear = nn.Linear(hidden_size, 2 * latent_dim)

    def forward(self, hidden: Tensor) -> Gaussian:
        # Never below float32: near -3 a bfloat16 log-variance moves in steps of 1/64, more than two trained
        # distributions differ by.
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            weight, bias = self.linear.weight.to(dtype), self.linear.bias.to(dtype)
            mean, raw = nn.functional.linear(hidden.to(dtype), weight, bias).chunk(2, dim=-1)
        return Gaussian(mean, self.low + (self.high - self.low) * raw.sigmoid())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        # Means of unit spread whatever the hidden size, so that a sample says something from the first step (with a
        # tenth of that the decoder learnt to ignore latents as noise); log-variances near `start` with little spread.
        share = (self.start - self.low) / (self.high - self.low)
        mean_weight, raw_weight = self.linear.weight.chunk(2)
        mean_bias, raw_bias = self.linear.bias.chunk(2)
        mean_weight.normal_(std=1 / math.sqrt(self.linear.in_features))
        raw_weight.normal_(std=0.1 / math.sqrt(self.linear.in_features))
        mean_bias.zero_()
        raw_bias.fill_(math.log(share / (1 - share)))


class LatentProjection(nn.Module):
    """Latents ``(batch, k, latent_dim)`` -> embeddings ``(batch, k, hidden_size)`` at the scale of token embeddings.

    A linear map and an RMS norm whose gain starts at the root mean square of the backbone's token embeddings:
    hidden states live at another norm, and a decoder fed at the wrong scale first has to unlearn it.
    """

    def __init__(self, latent_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(latent_dim, hidden_size)
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)

    def forward(self, z: Tensor) -> Tensor:
        return self.norm(self.linear(z.to(self.linear.weight.dtype)))

    @torch.no_grad()
    def reset_parameters(self, embedding_rms: float) -> None:
        self.linear.weight.normal_(std=1 / math.sqrt(self.linear.in_features))
        self.linear.bias.zero_()
        self.norm.weight.fill_(embedding_rms)


class Latents(nn.Module):
    """Everything AMVL adds to a backbone of width `hidden_size`.

    Attributes:
        slots: ``(num_latents, hidden_size)``, the placeholder embeddings whose final hidden states the heads read.
        end: ``(1, hidden_size)``, the learned end-of-latents embedding, or ``(0, hidden_size)`` when switched off.
        prior_head, posterior_head: `GaussianHead`.
        projection: `LatentProjection`.
    """

    def __init__(self, config: AMVLConfig, hidden_size: int) -> None:
        super().__init__()
        bounds = (config.logvar_min, config.logvar_max, config.logvar_init)
        self.slots = nn.Parameter(torch.empty(config.num_latents, hidden_size))
        self.end = nn.Parameter(torch.empty(int(config.end_of_latents), hidden_size))
        self.prior_head = GaussianHead(hidden_size, config.latent_dim, *bounds)
        self.posterior_head = GaussianHead(hidden_size, config.latent_dim, *bounds)
        self.projection = LatentProjection(config.latent_dim, hidden_size)

    @torch.no_grad()
    def reset_parameters(self, embedding_rms: float, end: Tensor) -> None:
        """Start from scratch.

        Args:
            embedding_rms: root mean square of the backbone's token embeddings, the scale of latents.
            end: ``(hidden_size,)``, the embedding that prompts end with. The end-of-latents embedding starts there, so
                that the row which predicts the answer's first token looks as it did to the backbone; the slots start
                near it, so that the backbone does at each what it does there: prepare the answer.
        """
        self.slots.normal_(std=SLOT_SPREAD * embedding_rms).add_(end)
        self.end.copy_(end.expand_as(self.end))
        self.posterior_head.reset_parameters()
        # The prior starts as the posterior: what separates them at first is only that one has seen the answer.
        self.prior_head.reset_parameters()
        self.prior_head.load_state_dict(self.posterior_head.state_dict())
        self.projection.reset_parameters(embedding_rms)
