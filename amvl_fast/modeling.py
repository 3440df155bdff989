"""`AMVLModel`: a Hugging Face image-text-to-text model that reasons in continuous latents."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

from amvl_fast.backbones import Adapter, adapter_for
from amvl_fast.configuration import AMVLConfig
from amvl_fast.errors import AMVLError
from amvl_fast.latents import Gaussian, Latents
from amvl_fast.objective import require_bound
from amvl_fast.ops import gaussian_noise, sample_gaussian
from amvl_fast.ops.arguments import seed_tensor
from amvl_fast.reference.three_pass import slot_states, three_pass
from amvl_fast.samples import (
    POSTERIOR_STREAM,
    PRIOR_STREAM,
    Branches,
    Samples,
    pad_rows,
    require_finite,
    split_prompt_and_answer,
    with_prompt,
)
from amvl_fast.step import importance_bound, shared_prefix

EXECUTIONS = ("shared_prefix", "three_pass")


@dataclass
class AMVLOutput(ModelOutput):
    """
    Args:
        loss: ``()``, ``ntp_weight * ntp_loss + prior_ntp_weight * prior_ntp_loss + beta * forward_kl +
            gamma * reverse_kl``, with KLs of at least `free_bits` a slot.
        ntp_loss: ``()``, nats per answer token, decoded from the posterior's samples.
        prior_ntp_loss: ``()``, the same decoded from a sample of the prior; None unless asked for.
        forward_kl: ``()``, KL(q || p) with q the posterior, reduced as the configuration's `kl_reduction` says.
        reverse_kl: ``()``, KL(p || q), likewise.
        forward_kl_per_slot, reverse_kl_per_slot: ``(batch, num_latents)`` float32, summed over dimensions.
        z: ``(batch, num_latents, latent_dim)``, the posterior's (first) sample.
        posterior_mean, posterior_logvar, prior_mean, prior_logvar: ``(batch, num_latents, latent_dim)``.
        nll, prior_nll: ``(batch,)`` float32, nats summed over each sample's answer.
        answer_tokens: ``(batch,)`` int64.
    """

    loss: Tensor | None = None
    ntp_loss: Tensor | None = None
    prior_ntp_loss: Tensor | None = None
    forward_kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    forward_kl_per_slot: Tensor | None = None
    reverse_kl_per_slot: Tensor | None = None
    z: Tensor | None = None
    posterior_mean: Tensor | None = None
    posterior_logvar: Tensor | None = None
    prior_mean: Tensor | None = None
    prior_logvar: Tensor | None = None
    nll: Tensor | None = None
    prior_nll: Tensor | None = None
    answer_tokens: Tensor | None = None


class AMVLModel(PreTrainedModel):
    """A backbone, unmodified, and the `Latents` around it.

    Build it with `from_backbone`, reload it with `from_pretrained`. The vision tower is frozen by default, as in the
    paper (arXiv 2607.00461).
    """

    config: AMVLConfig
    config_class = AMVLConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: AMVLConfig, backbone: PreTrainedModel | None = None) -> None:
        if backbone is None and config.backbone_config is None:
            raise AMVLError("AMVLModel needs a backbone; build it with AMVLModel.from_backbone(backbone, config).")
        super().__init__(config)
        if backbone is None:
            backbone = AutoModelForImageTextToText.from_config(config.backbone_config)
        else:
            # post_init draws what does not say that it has its weights, such as adapters added to a loaded model.
            for module in backbone.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]
        self.backbone = backbone
        self.latents = Latents(config, self.adapter.hidden_size)
        self.post_init()

    @property
    def adapter(self) -> Adapter:
        """What the step knows of the backbone's family; looked up anew, because users wrap or replace a backbone."""
        return adapter_for(self.backbone)

    @classmethod
    def from_backbone(
        cls,
        backbone: PreTrainedModel | str,
        config: AMVLConfig | None = None,
        *,
        freeze_vision: bool = True,
        end_token_id: int | None = None,
        **kwargs: Any,
    ) -> AMVLModel:
        """Put AMVL around a pretrained model.

        Args:
            backbone: an image-text-to-text model of transformers, used as it is and not copied; or the directory or
                hub name of one.
            config: the latents' configuration; None takes the defaults.
            freeze_vision: take the vision tower out of training.
            end_token_id: the token that your prompts end with (`input_ids[0, -1]` of a prompt without padding on the
                right). Slots and end-of-latents embedding start from its embedding, so that training starts from
                the backbone's accuracy instead of from noise. None starts them from the mean embedding.
            kwargs: passed to ``AutoModelForImageTextToText.from_pretrained`` with a name (`dtype`, `device_map`,
                `attn_implementation`, ...).

        Raises:
            AMVLError: the architecture is not supported.
        """
        if isinstance(backbone, PreTrainedModel):
            if kwargs:
                raise AMVLError(f"from_backbone: {sorted(kwargs)} go with a name, but a loaded model was given.")
        else:
            backbone = AutoModelForImageTextToText.from_pretrained(backbone, **kwargs)
        adapter = adapter_for(backbone)
        config = copy.deepcopy(config or AMVLConfig())
        # A copy: building a model writes its attention implementation through to the configurations inside its own.
        config.backbone_config = copy.deepcopy(backbone.config)
        config.dtype = backbone.dtype
        model = cls(config, backbone)
        # Looked up, for some families scale what their table holds.
        table = model.get_input_embeddings()
        embeddings: Tensor = table(torch.arange(table.num_embeddings, device=table.weight.device)).detach().float()
        end = embeddings.mean(0) if end_token_id is None else embeddings[end_token_id]
        model.latents.reset_parameters(embeddings.square().mean().sqrt().item(), end)
        model.latents.to(device=backbone.device, dtype=backbone.dtype)
        adapter.vision_tower.requires_grad_(not freeze_vision)
        return model

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As in transformers; the backbone's generation defaults (end tokens, penalties, ...) come back too."""
        loaded = super().from_pretrained(name, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        where = {
            key: kwargs[key] for key in ("cache_dir", "local_files_only", "revision", "subfolder") if key in kwargs
        }
        with contextlib.suppress(OSError):  # a checkpoint may come without that file
            model.backbone.generation_config = GenerationConfig.from_pretrained(name, **where)
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with the backbone's generation defaults beside the weights."""
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        self.backbone.generation_config.save_pretrained(save_directory)
        return saved

    def get_input_embeddings(self) -> Any:
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.backbone.get_output_embeddings()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        return self.backbone.resize_token_embeddings(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        beta: float = 1.0,
        gamma: float = 0.1,
        ntp_weight: float = 1.0,
        prior_ntp_weight: float = 0.0,
        free_bits: float = 0.0,
        stop_gradient: bool = True,
        seed: int | Tensor | None = None,
        sample_ids: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        num_samples_in_batch: int | Tensor | None = None,
        execution: str = "shared_prefix",
        num_posterior_samples: int = 1,
        posterior_bound: str = "mean",
        padding_free: bool = False,
        image_features: dict[str, Tensor] | None = None,
        **vision: Any,
    ) -> AMVLOutput:
        """The AMVL loss of a batch, ``L = L_NTP + beta * KL(sg[q] || p) + gamma * KL(sg[p] || q)``.

        Args:
            input_ids: ``(batch, length)`` int64, prompt and answer, padded on either side.
            attention_mask: ``(batch, length)``, 0 on padding; None means no padding.
            labels: ``(batch, length)`` int64, token ids on the answer and -100 elsewhere.
            beta: weight of the forward KL, which moves only the prior.
            gamma: weight of the reverse KL, which moves only the posterior.
            ntp_weight: weight of the answer's loss decoded from a posterior sample.
            prior_ntp_weight: weight of the answer's loss decoded from a prior sample. Not part of the paper.
            free_bits: nats below which the KL of one slot of one sample costs nothing and moves nothing (Kingma et al.
                2016, there of a batch's average). Not part of the paper.
            stop_gradient: False lets both KLs move both sides (the plain ELBO).
            seed: of the noise; None draws one from PyTorch's generator. See `amvl_fast.gaussian_noise`.
            sample_ids: ``(batch,)`` int64: noise belongs to these numbers instead of to places in the batch, so that a
                sample's noise does not depend on how batches are split.
            num_items_in_batch: answer tokens that the losses of tokens are divided by, where this batch is a part of
                one; None means this batch's own.
            num_samples_in_batch: samples that the KLs are divided by, likewise.
            execution: ``"shared_prefix"`` runs the prompt once for all branches; ``"three_pass"``, the plain one, runs
                it again for each. Their results and gradients are the same.
            num_posterior_samples: how many samples of the posterior are decoded. The first has the noise of `seed`,
                the next that of ``seed + 1``, and so on. Not part of the paper.
            posterior_bound: what becomes of several: ``"mean"`` averages their losses, ``"importance"`` takes the
                importance-weighted bound ``-log mean_s p(y|x,z_s) p(z_s|x) / q(z_s|x,y)`` (Burda et al. 2016), which
                holds the KL within it and sends gradients to both distributions.
            padding_free: run prompts of different lengths packed into one row; takes a flash attention.
            image_features: in place of `pixel_values`, what the backbone's adapter makes of the batch's images (see
                `amvl_fast.backbones.Adapter.encode_images`), ``(image tokens of the batch, ...)`` each.
            vision: what the processor gives for images (`pixel_values`, `image_grid_thw`, ...).

        Raises:
            AMVLError: labels that do not split into prompt and answer, unknown inputs, NaN in the images, or options
                that do not go together with the backbone.
        """
        if execution not in EXECUTIONS:
            raise AMVLError(f"execution={execution!r} is not known; use one of {EXECUTIONS}.")
        require_bound(num_posterior_samples, posterior_bound)
        if padding_free and execution != "shared_prefix":
            raise AMVLError(f"padding_free goes with execution='shared_prefix', not with {execution!r}.")
        if labels is None:
            raise AMVLError("AMVLModel.forward needs labels (-100 on the prompt); to answer a prompt call generate().")
        samples = self._read(input_ids, attention_mask, labels, {**vision, "image_features": image_features})
        first = seed_tensor("AMVLModel", seed, self.device)
        seeds = [first + i for i in range(num_posterior_samples)]
        options: dict[str, Any] = dict(decode_prior=prior_ntp_weight > 0, stop_gradient=stop_gradient)
        options["sample_ids"] = sample_ids
        if execution == "shared_prefix":
            step = shared_prefix(self.adapter, self.latents, samples, seeds, padding_free=padding_free, **options)
        else:
            step = self._three_pass(samples, seeds, **options)
        count = len(input_ids) if num_samples_in_batch is None else num_samples_in_batch
        forward_kl, reverse_kl = self._reduce_kl(step.forward_kl, count), self._reduce_kl(step.reverse_kl, count)
        nll = importance_bound(step) if posterior_bound == "importance" else step.nll.average()
        ntp_loss = nll.mean(num_items_in_batch)
        paid = [self._reduce_kl(kl.clamp(min=free_bits), count) for kl in (step.forward_kl, step.reverse_kl)]
        loss = ntp_weight * ntp_loss + beta * paid[0] + gamma * paid[1]
        prior_ntp_loss = step.prior_nll.mean(num_items_in_batch) if step.prior_nll else None
        if prior_ntp_loss is not None:
            loss = loss + prior_ntp_weight * prior_ntp_loss
        return AMVLOutput(
            loss=loss,
            ntp_loss=ntp_loss,
            prior_ntp_loss=prior_ntp_loss,
            forward_kl=forward_kl,
            reverse_kl=reverse_kl,
            forward_kl_per_slot=step.forward_kl,
            reverse_kl_per_slot=step.reverse_kl,
            z=step.z[0],
            posterior_mean=step.posterior.mean,
            posterior_logvar=step.posterior.logvar,
            prior_mean=step.prior.mean,
            prior_logvar=step.prior.logvar,
            nll=nll.total,
            prior_nll=step.prior_nll.total if step.prior_nll else None,
            answer_tokens=nll.tokens,
        )

    def prior(self, input_ids: Tensor, attention_mask: Tensor | None = None, **vision: Any) -> Gaussian:
        """What the prompt alone says of the latents: mean and log-variance, ``(batch, num_latents, latent_dim)``."""
        return self._prior(self._read(input_ids, attention_mask, None, vision))

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        latent_temperature: float | None = None,
        seed: int | Tensor | None = None,
        sample_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Answer prompts from the prior: latents first, then transformers' own ``generate``.

        Args:
            input_ids: ``(batch, length)`` int64, prompts ending where the answer begins, padded on either side.
            latent_temperature: multiplies the prior's standard deviation; 0 is its mean. None takes the
                configuration's.
            seed: of the latents' noise; None draws one.
            sample_ids: see `forward`.
            kwargs: what the processor gives for images, and whatever ``transformers`` accepts (`max_new_tokens`,
                `do_sample`, ...). All sequences of one prompt (`num_return_sequences`, beams) share its latents, and
                processors that look at earlier tokens, such as `repetition_penalty`, see the new ones alone.

        Returns:
            What the backbone's own ``generate`` would return: prompt and new tokens, ``(batch, length + new)`` int64,
            or transformers' output object with such `sequences`.
        """
        images = [name for name in kwargs if name.startswith(("pixel_values", "image_", "video_", "mm_"))]
        vision = {name: kwargs.pop(name) for name in images}
        if "max_length" in kwargs:  # counts the prompt, of which the backbone sees embeddings and latents
            kwargs.setdefault("max_new_tokens", kwargs.pop("max_length") - input_ids.shape[1])
        samples = self._read(input_ids, attention_mask, None, vision)
        prior = self._prior(samples)
        temperature = self.config.latent_temperature if latent_temperature is None else latent_temperature
        z = sample_gaussian(*prior, temperature=temperature, seed=seed, sample_ids=sample_ids)
        lead = torch.cat([self.latents.projection(z), self.latents.end.expand(len(z), -1, -1)], dim=1)
        out = self._continue(samples, lead.to(samples.embeds.dtype), kwargs)
        # Embeddings went in, so only new tokens came out; callers cut the prompt off what a backbone returns.
        if isinstance(out, Tensor):
            return torch.cat([input_ids.repeat_interleave(len(out) // len(input_ids), dim=0), out], dim=1)
        copies = len(out.sequences) // len(input_ids)
        out.sequences = torch.cat([input_ids.repeat_interleave(copies, dim=0), out.sequences], dim=1)
        return out

    def _read(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, vision: dict[str, Any]
    ) -> Samples:
        """Embed a batch and split it; without labels the whole row is prompt."""
        vision = {name: value for name, value in vision.items() if value is not None}
        features = vision.pop("image_features", None)
        require_finite(**vision, **{f"image_features[{name!r}]": value for name, value in (features or {}).items()})
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if labels is None:
            prompt, answer = attention_mask.bool(), torch.zeros_like(attention_mask, dtype=torch.bool)
            labels = torch.full_like(input_ids, -100)
        else:
            prompt, answer = split_prompt_and_answer(labels, attention_mask)
        embedded = self.adapter.embed(input_ids, features, **vision)
        positions = self.adapter.positions(input_ids, attention_mask, **vision)
        return Samples(*embedded, positions, prompt, answer, labels)

    def _prior(self, samples: Samples) -> Gaussian:
        # One branch has nobody to share with.
        return self.latents.prior_head(slot_states(self.adapter, self.latents, samples, see_answer=False))

    def _three_pass(
        self,
        samples: Samples,
        seeds: list[Tensor],
        *,
        sample_ids: Tensor | None,
        decode_prior: bool,
        stop_gradient: bool,
    ) -> Branches:
        """The plain step, with the noise that the ops make of the seeds."""
        shape = (len(samples.embeds), self.config.num_latents, self.config.latent_dim)
        draw = partial(gaussian_noise, shape, device=self.device, sample_ids=sample_ids)
        noise = [draw(seed=seed, stream=POSTERIOR_STREAM) for seed in seeds]
        prior_noise = draw(seed=seeds[0], stream=PRIOR_STREAM) if decode_prior else None
        return three_pass(self.adapter, self.latents, samples, noise, prior_noise, stop_gradient=stop_gradient)

    def _continue(self, samples: Samples, lead: Tensor, generate_kwargs: dict[str, Any]) -> Any:
        """Generate after ``[x, lead]``; `lead` is ``(batch, rows, hidden_size)``."""
        embeds, mask, positions, extras = pad_rows(with_prompt(samples, list(lead)), "left")
        return self.adapter.generate(embeds, mask, positions, extras, **generate_kwargs)

    def _reduce_kl(self, per_slot: Tensor, count: int | Tensor) -> Tensor:
        """``(batch, k)`` summed over d -> the mean over `count` samples, per sample or per latent element."""
        if self.config.kl_reduction == "mean":
            per_slot = per_slot / (self.config.num_latents * self.config.latent_dim)
        return per_slot.sum() / count

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # A part missing from a checkpoint starts as in `from_backbone`, at the usual spread of token embeddings.
        if isinstance(module, Latents):
            module.reset_parameters(embedding_rms=0.02, end=torch.zeros_like(module.slots[0]))


# `Auto` classes then load an AMVL checkpoint wherever amvl_fast has been imported.
AutoConfig.register(AMVLConfig.model_type, AMVLConfig)
AutoModelForImageTextToText.register(AMVLConfig, AMVLModel)
