"""What the step should take for Qwen2.5-VL-7B on GPUs that are not here; printed below the step benchmark's tables."""

from __future__ import annotations

from collections.abc import Iterator

from amvl_fast.bench.steps import FLOOR, OURS, THREE_PASS, StepCase
from amvl_fast.cost.activations import FLOAT32, HALF, call_bytes, prompt_key_bytes
from amvl_fast.cost.flops import (
    SHARED_PREFIX,
    Call,
    Recipe,
    Sample,
    attention_flops,
    calls,
    head_flops,
    linear_flops,
)
from amvl_fast.cost.gpus import GPUS
from amvl_fast.cost.sizes import Decoder
from amvl_fast.cost.timing import SHARE, weight_traffic
from amvl_fast.text import grid

BYTES = 2  # of a bfloat16
SHAPES = [StepCase(prompt, answer, batch=8) for prompt in (512, 1500, 4096) for answer in (32, 150)]

ASSUMPTIONS = f"""\
ms = the larger of operations over {SHARE:.0%} of the published dense bfloat16 peak (A100 312, H100 and H200 989, B200
2250 TFLOP/s; the share is our assumption) and bytes over the published bandwidth of the memory. Forward and backward
alone: no vision tower, no optimiser, none of AMVL's own small layers. The last two columns are those of the H100.
  TFLOP        2 forward and 4 backward for each weight of a linear layer and token. Attention: 4 forward and 10
               backward, where flash attention makes its scores again, for each dimension of a head and each query with
               a key that it may read. Logits of answers alone; all but three_pass make them again going backward.
               shared_prefix can take less than the floor: of the prompt's last layer only keys and values are used.
  GB moved     weights twice for each call of the decoder (floor one, the others three), their gradients written once,
               and added up from the second call on; activations written and read once. All bfloat16.
  keys MB      keys and values of one sample's prompt, which the branches of shared_prefix read.
  activations  kept for the backward pass, for the whole batch, as amvl_fast/cost/activations.py counts them: norms keep
               float32, and each branch a copy of the keys and values that it reads. Where they do not fit,
               checkpointing drops most of them and costs about a third more operations, for all three alike."""


QWEN_7B = Decoder(28, 3584, 18944, 28, 4, 128, 152_064)


def recipe(provider: str) -> Recipe:
    """A step as the predictions take it: flash attention, no checkpointing."""
    return Recipe(SHARED_PREFIX if provider == OURS else THREE_PASS, attention="flash")


def made_calls(provider: str, case: StepCase) -> list[Call]:
    """What a step calls the decoder for; the latent's end is not counted."""
    if provider == FLOOR:
        return [Call(0, (case.unique_rows,))]
    return calls(case.k, 0, Sample(case.prompt, case.answer), recipe(provider))


def flops(decoder: Decoder, provider: str, case: StepCase) -> float:
    """Of a whole step. The floor makes logits anew, as `shared_prefix` does."""
    chosen, made = recipe(provider), made_calls(provider, case)
    decoding = sum(
        linear_flops(decoder, call, chosen).total + attention_flops(decoder, call, chosen).total for call in made
    )
    logits = head_flops(decoder, Sample(case.prompt, case.answer), recipe(OURS if provider == FLOOR else provider))
    return case.batch * (decoding + logits.total)


def activation_bytes(decoder: Decoder, provider: str, case: StepCase) -> float:
    """Kept by the decoder's layers, and logits where they are kept."""
    kept = sum(call_bytes(decoder, call, recipe(provider), HALF) for call in made_calls(provider, case))
    logits = case.answer * decoder.vocabulary * FLOAT32 if provider == THREE_PASS else 0
    return case.batch * (kept + logits)


def moved_bytes(decoder: Decoder, provider: str, case: StepCase) -> float:
    """Read and written in a whole step."""
    weights = weight_traffic(decoder, len(made_calls(provider, case)), recipe(provider))
    return BYTES * weights + 2 * activation_bytes(decoder, provider, case)


def seconds(decoder: Decoder, provider: str, case: StepCase, gpu: str) -> float:
    compute = flops(decoder, provider, case) / (SHARE * GPUS[gpu].matrix_flops)
    return max(compute, moved_bytes(decoder, provider, case) / GPUS[gpu].bandwidth)


def predicted_steps(decoder: Decoder = QWEN_7B) -> str:
    """The table and what it assumes."""
    header = ["|x|", "|y|", "step", "TFLOP", "GB moved", "keys MB", "activations GB"]
    header += [f"{gpu.split()[0]} ms" for gpu in GPUS] + ["x three_pass", "of floor"]
    title = (
        f"Predicted, not measured: a step of Qwen2.5-VL-7B ({decoder.weights / 1e9:.2f}e9 weights), k = 8, batch of 8"
    )
    return "\n".join([title, grid(header, lines(decoder)), "", ASSUMPTIONS])


def lines(decoder: Decoder) -> Iterator[list[str]]:
    for case in SHAPES:
        for provider in (THREE_PASS, OURS, FLOOR):
            times = {gpu: seconds(decoder, provider, case, gpu) for gpu in GPUS}
            reference = "H100 SXM"
            yield [
                *(str(case.prompt), str(case.answer), provider),
                f"{flops(decoder, provider, case) / 1e12:.0f}",
                f"{moved_bytes(decoder, provider, case) / 1e9:.0f}",
                f"{prompt_key_bytes(decoder, Sample(case.prompt, case.answer)) / 1e6:.0f}",
                f"{activation_bytes(decoder, provider, case) / 1e9:.0f}",
                *(f"{1e3 * time:.0f}" for time in times.values()),
                f"{seconds(decoder, THREE_PASS, case, reference) / times[reference]:.2f}",
                f"{times[reference] / seconds(decoder, FLOOR, case, reference):.3f}",
            ]
