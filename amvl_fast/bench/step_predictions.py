"""What the step should take for Qwen2.5-VL-7B on GPUs that are not here; printed below the step benchmark's tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from amvl_fast.bench.gpus import GPUS
from amvl_fast.bench.steps import FLOOR, OURS, THREE_PASS, StepCase
from amvl_fast.bench.tables import grid

# Dense bfloat16 operations a second on tensor cores, by NVIDIA's data sheets.
SHARE = 0.5  # of a GPU's peak that a step reaches
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
  activations  kept for the backward pass, for the whole batch: 6 hidden, 2 key-value and 4 intermediate vectors a token
               and layer. Where they do not fit, checkpointing drops most of them and costs about a third more
               operations, for all three alike."""


@dataclass(frozen=True)
class Decoder:
    """A decoder's sizes: grouped-query attention and a gated MLP."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def kv_weights(self) -> int:
        """Of one layer's linear maps to keys and values."""
        return 2 * self.hidden * self.kv_heads * self.head_dim

    @property
    def layer_weights(self) -> int:
        """Of one layer's linear maps."""
        return 2 * self.hidden * self.heads * self.head_dim + self.kv_weights + 3 * self.hidden * self.intermediate

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocabulary

    @property
    def weights(self) -> int:
        return self.layers * self.layer_weights + self.head_weights

    @property
    def kept_per_token(self) -> int:
        """Numbers that a token's layers keep for the backward pass, logits left out."""
        return self.layers * (6 * self.hidden + 2 * self.kv_heads * self.head_dim + 4 * self.intermediate)


QWEN_7B = Decoder(28, 3584, 18944, 28, 4, 128, 152_064)


@dataclass(frozen=True)
class Call:
    """One call of the decoder, for one sample.

    Attributes:
        before: rows whose keys and values are there already.
        branches: rows of each branch, blind to one another.
        is_read: False where nobody reads the final hidden states, but only keys and values.
    """

    before: int
    branches: tuple[int, ...]
    is_read: bool = True

    @property
    def rows(self) -> int:
        return sum(self.branches)

    @property
    def pairs(self) -> float:
        """Queries and the keys they may read; of the own rows each reads half on average."""
        return sum(rows * (self.before + rows / 2) for rows in self.branches)


def calls(provider: str, case: StepCase) -> list[Call]:
    """What a step calls the decoder for; the latent's end is not counted."""
    x, y, k = case.prompt, case.answer, case.k
    if provider == FLOOR:
        return [Call(0, (case.unique_rows,))]
    if provider == THREE_PASS:
        return [Call(0, (x + k,)), Call(0, (x + y + k,)), Call(0, (x + k + y,))]
    return [Call(0, (x,), is_read=False), Call(x, (k, y + k)), Call(x, (k + y,))]


def weight_flops(decoder: Decoder, call: Call) -> int:
    """Forward and backward, of all linear maps but the head."""
    trained = decoder.layers * decoder.layer_weights
    if not call.is_read:
        trained -= decoder.layer_weights - decoder.kv_weights
    return call.rows * (2 * decoder.layers * decoder.layer_weights + 4 * trained)


def attention_flops(decoder: Decoder, call: Call, pairs: float, backward: float = 2.5) -> float:
    """Forward and backward; the backward pass costs `backward` times the forward one."""
    trained = decoder.layers if call.is_read else decoder.layers - 1
    return 4 * pairs * decoder.heads * decoder.head_dim * (decoder.layers + backward * trained)


def head_flops(decoder: Decoder, provider: str, case: StepCase) -> int:
    """Logits of the answer, forward and backward, and forward once more unless they are kept."""
    return (6 if provider == THREE_PASS else 8) * decoder.head_weights * case.answer


def flops(decoder: Decoder, provider: str, case: StepCase) -> float:
    """Of a whole step."""
    made = calls(provider, case)
    decoding = sum(weight_flops(decoder, call) + attention_flops(decoder, call, call.pairs) for call in made)
    return case.batch * (decoding + head_flops(decoder, provider, case))


def activation_bytes(decoder: Decoder, provider: str, case: StepCase) -> int:
    rows = sum(call.rows for call in calls(provider, case))
    logits = case.answer * decoder.vocabulary if provider == THREE_PASS else 0
    return BYTES * case.batch * (rows * decoder.kept_per_token + logits)


def prompt_key_bytes(decoder: Decoder, case: StepCase) -> int:
    """Keys and values of one sample's prompt."""
    return BYTES * 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * case.prompt


def moved_bytes(decoder: Decoder, provider: str, case: StepCase) -> int:
    """Read and written in a whole step."""
    made = len(calls(provider, case))
    # The head is called once, whoever asks. Adding a gradient up reads two and writes one.
    weights = decoder.layers * decoder.layer_weights * (3 * made + 3 * (made - 1)) + 3 * decoder.head_weights
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
                f"{prompt_key_bytes(decoder, case) / 1e6:.0f}",
                f"{activation_bytes(decoder, provider, case) / 1e9:.0f}",
                *(f"{1e3 * time:.0f}" for time in times.values()),
                f"{seconds(decoder, THREE_PASS, case, reference) / times[reference]:.2f}",
                f"{times[reference] / seconds(decoder, FLOOR, case, reference):.3f}",
            ]
