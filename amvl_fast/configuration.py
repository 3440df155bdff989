"""The configuration of an AMVL model: the latents, their heads, and the backbone around which they are built."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from amvl_fast.errors import AMVLError

FORMAT_VERSION = 1
KL_REDUCTIONS = ("sum", "mean")


class AMVLConfig(PreTrainedConfig):
    r"""
    The paper (arXiv 2607.00461) fixes ``num_latents=8`` and ``latent_dim=512``. Every other default below is ours.

    Args:
        num_latents: `k`, the number of latent slots.
        latent_dim: `d`, the dimensions of one latent.
        logvar_min, logvar_max: the bounds of every log-variance; a scaled sigmoid keeps it strictly between them.
        logvar_init: the log-variance that both heads start from. Low enough that a first sample is mostly its mean:
            the slots come right before the answer, and starting at 0 would feed the decoder mostly noise.
        end_of_latents: put one learned embedding between the last latent and the answer, so that the row that
            predicts the first answer token is not itself a noisy latent.
        kl_reduction: how the KL of one sample is reduced over its slots and dimensions: ``"sum"`` is the KL of the
            whole latent, ``"mean"`` divides it by ``num_latents * latent_dim``. Both are averaged over the batch.
        latent_temperature: what `AMVLModel.generate` multiplies the prior's standard deviation by unless told
            otherwise; 0 answers from the prior's mean.
        backbone_config: the configuration of the backbone; filled in by `AMVLModel.from_backbone`.
        format_version: of the checkpoint; a newer one than this package knows is refused.

    Raises:
        AMVLError: a value is out of its range, or the checkpoint was written by a newer version.
    """

    model_type = "amvl"
    # The model type only satisfies transformers' bookkeeping: a saved configuration names its own.
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2_5_vl", optional=True)
    }

    num_latents: int = 8
    latent_dim: int = 512
    logvar_min: float = -10.0
    logvar_max: float = 2.0
    logvar_init: float = -3.0
    end_of_latents: bool = True
    kl_reduction: str = "mean"
    latent_temperature: float = 1.0
    backbone_config: dict[str, Any] | PreTrainedConfig | None = None
    format_version: int = FORMAT_VERSION

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The language model's configuration, which is the backbone's."""
        if isinstance(self.backbone_config, PreTrainedConfig):
            return self.backbone_config.get_text_config(*args, **kwargs)
        return super().get_text_config(*args, **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.format_version > FORMAT_VERSION:
            raise AMVLError(
                f"This checkpoint has format version {self.format_version}, but the installed amvl_fast reads up to "
                f"{FORMAT_VERSION}; upgrade amvl_fast."
            )
        for name in ("num_latents", "latent_dim"):
            if getattr(self, name) < 1:
                raise AMVLError(f"AMVLConfig: {name} is {getattr(self, name)}, but must be at least 1.")
        if not self.logvar_min < self.logvar_init < self.logvar_max:
            raise AMVLError(
                "AMVLConfig: logvar_min < logvar_init < logvar_max must hold, but they are "
                f"{self.logvar_min}, {self.logvar_init} and {self.logvar_max}."
            )
        if self.kl_reduction not in KL_REDUCTIONS:
            raise AMVLError(f"AMVLConfig: kl_reduction is {self.kl_reduction!r}; use one of {KL_REDUCTIONS}.")
        if self.latent_temperature < 0:
            raise AMVLError(f"AMVLConfig: latent_temperature is {self.latent_temperature}, but must be at least 0.")
