"""What DeepSpeed's ZeRO has to be told: when it may shard, how to generate, and that nothing is unpickled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers.integrations import deepspeed as integration


@contextlib.contextmanager
def loading_whole() -> Iterator[None]:
    """Models are loaded whole, and sharded when training begins; ZeRO-3 would have transformers shard them at once.

    Latents start from the backbone's embeddings, which must be there.
    """
    reference = integration._hf_deepspeed_config_weak_ref
    config = reference() if reference is not None else None
    if config is None:
        yield
        return
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration.set_hf_deepspeed_config(config)


@contextlib.contextmanager
def gathered(model: Any, engine: Any) -> Iterator[None]:
    """All weights of a model that ZeRO-3 has sharded, on every process: it gathers them in training's forward only."""
    if engine is None or engine.zero_optimization_stage() != 3:
        yield
        return
    import deepspeed

    hooks = engine.optimizer.parameter_offload
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        hooks._remove_module_hooks()
        try:
            yield
        finally:
            hooks.setup_zero_stage3_hooks()


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """DeepSpeed reads its checkpoints without unpickling what could run code; it has no option for that."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def load(self: Any, path: str, map_location: Any = None) -> Any:
        return torch.load(path, map_location=map_location, weights_only=True)

    before = TorchCheckpointEngine.load
    TorchCheckpointEngine.load = load
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        TorchCheckpointEngine.load = before
