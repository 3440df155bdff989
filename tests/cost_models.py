"""Tiny models whose cost is predicted and counted."""

import peft
import torch
from transformers import AutoModelForImageTextToText

from amvl_fast import AMVLConfig, AMVLModel

BATCH = 2
EXECUTIONS = ("shared_prefix", "three_pass")
LATENTS = AMVLConfig(num_latents=3, latent_dim=5)
LORA = r".*(language_model|text_model).*\.(q|k|v|o|gate|up|down)_proj"
CHECKPOINTING = {"use_reentrant": False, "preserve_rng_state": False}


def build(config, rank=0, freeze_vision=True, dtype=torch.float32, latents=LATENTS, **options):
    torch.manual_seed(0)
    backbone = AutoModelForImageTextToText.from_config(config, **options).to(dtype)
    model = AMVLModel.from_backbone(backbone, latents, freeze_vision=freeze_vision)
    if rank:
        model.backbone = peft.get_peft_model(model.backbone, peft.LoraConfig(r=rank, target_modules=LORA))
    return model.train()
