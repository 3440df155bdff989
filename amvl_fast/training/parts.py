"""The parts of a model: trained at rates of their own or frozen, with gradients looked at apart."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from amvl_fast.backbones import adapter_for
from amvl_fast.errors import AMVLError
from amvl_fast.lora import base_of
from amvl_fast.modeling import AMVLModel

# Of a model with all of them: `lora` are the adapters, wherever they are; `connector` is what stands between tower and
# language model, which some families (Qwen) count to the tower; token embeddings and head belong to the language model.
PARTS = ("language_model", "lora", "latents", "connector", "vision_tower")


def parts_of(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Each part's parameters by their names in `model`; parts that the model does not have are left out."""
    whole = base_of(model)
    adapter = adapter_for(whole.backbone if isinstance(whole, AMVLModel) else whole)
    tower = {id(p) for p in adapter.vision_tower.parameters()}
    connector = {id(p) for p in adapter.vision_parameters().values()} - tower
    latents = {id(p) for p in whole.latents.parameters()} if isinstance(whole, AMVLModel) else set()
    parts: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            part = "lora"
        elif id(parameter) in latents:
            part = "latents"
        elif id(parameter) in tower:
            part = "vision_tower"
        else:
            part = "connector" if id(parameter) in connector else "language_model"
        parts.setdefault(part, {})[name] = parameter
    return {part: parts[part] for part in PARTS if part in parts}


def freeze(model: nn.Module, names: Iterable[str]) -> None:
    """Take parts out of training.

    Raises:
        AMVLError: a part that the model does not have, or nothing is left to train.
    """
    parts = parts_of(model)
    for name in names:
        if name == "connector" and name not in parts:
            continue  # counted to the tower, which says itself whether it is trained
        if name not in parts:
            raise AMVLError(f"model.freeze names {name!r}, which the model does not have; use of: {', '.join(parts)}.")
        for parameter in parts[name].values():
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise AMVLError("model.freeze leaves nothing to train; leave a part out of it.")


@torch.no_grad()
def gradient_norms(model: nn.Module) -> dict[str, float]:
    """The Euclidean norm of each part's gradients, of those that have any; shards are added up over processes."""
    norms = {}
    for part, parameters in parts_of(model).items():
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        if gradients:
            norms[part] = float(_whole(nn.utils.get_total_norm(gradients)))
    return norms


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
