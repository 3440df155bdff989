"""What a whole AMVL step is measured on: sizes, contestants, and the floor under them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from amvl_fast import AMVLConfig, AMVLModel
from amvl_fast.answers import token_nll

Step = Callable[[], Tensor]

VOCABULARY = 4096

OURS, THREE_PASS, FLOOR = "shared_prefix", "three_pass", "floor"
SEVERAL = "shared_prefix, 4 samples"


@dataclass(frozen=True)
class StepCase:
    """One shape of batch: `batch` samples of `prompt` and `answer` tokens, and `k` latents."""

    prompt: int
    answer: int
    k: int = 8
    batch: int = 1

    @property
    def name(self) -> str:
        return f"step |x|={self.prompt} |y|={self.answer} k={self.k} batch={self.batch}"

    @property
    def unique_rows(self) -> int:
        """Rows that no exact step can do without, for each sample: the prompt, and three short branches."""
        return self.prompt + self.k + 2 * (self.answer + self.k)


# What the step has to hold on: at least so many times faster than three passes, at most so many times the floor.
CASES = {
    StepCase(64, 8, batch=8): (2.0, 1.20),
    StepCase(256, 16, batch=4): (2.5, 1.08),
    StepCase(1024, 32, batch=2): (2.8, 1.05),
    StepCase(2048, 128, batch=1): (2.6, 1.05),
}
SCALING = [StepCase(prompt, 16) for prompt in (64, 128, 256, 512, 1024, 2048, 4096)]
# Where four samples of the posterior are decoded, too, and how many times the step with one that may take.
SAMPLES, SAMPLES_BAR = StepCase(1024, 32, batch=2), 1.3
QUICK_CASES = [StepCase(16, 4)]


def step_cases(*, quick: bool = False) -> list[StepCase]:
    """All that is measured, in the order of the report."""
    return QUICK_CASES if quick else [*CASES, *SCALING]


def contestants(case: StepCase) -> list[str]:
    """Who is measured on a case."""
    return [OURS, THREE_PASS, FLOOR, *([SEVERAL] if case == SAMPLES else [])]


def make_model(k: int) -> AMVLModel:
    """A small Qwen2.5-VL: what a step costs beside its floor depends on shapes far more than on width."""
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=8192,
            bos_token_id=0,
            eos_token_id=1,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        ),
        vision_config=dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=256),
    )
    backbone = Qwen2_5_VLForConditionalGeneration(config)
    return AMVLModel.from_backbone(backbone, AMVLConfig(num_latents=k)).train()


def make_steps(model: AMVLModel, case: StepCase, device: torch.device) -> dict[str, Step]:
    """Everybody's forward and backward pass on a case, by name. Each returns its loss."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.prompt + case.answer)
    input_ids = torch.randint(10, VOCABULARY, shape, generator=generator).to(device)
    labels = input_ids.masked_fill(torch.arange(shape[1], device=device) < case.prompt, -100)
    floor_ids = torch.randint(10, VOCABULARY, (case.batch, case.unique_rows), generator=generator).to(device)

    def amvl(**options: int | str) -> Step:
        def step() -> Tensor:
            model.zero_grad()
            loss = model(input_ids, labels=labels, **options).loss
            loss.backward()
            return loss

        return step

    def floor() -> Tensor:
        """The same decoder once over as many rows, causal, with logits for as many answer rows."""
        model.zero_grad()
        adapter = model.adapter
        embeds = adapter.embed(floor_ids).embeds
        hidden = adapter.decode(embeds, None, adapter.positions(floor_ids, torch.ones_like(floor_ids)))
        answers, targets = hidden[:, -case.answer - 1 : -1], floor_ids[:, -case.answer :]
        loss = token_nll(adapter.head, answers.flatten(0, 1), targets.flatten()).mean()
        loss.backward()
        return loss

    return {
        OURS: amvl(),
        THREE_PASS: amvl(execution=THREE_PASS),
        FLOOR: floor,
        SEVERAL: amvl(num_posterior_samples=4),
    }
