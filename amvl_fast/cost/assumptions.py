"""What a plan takes for granted, printed with it."""

from __future__ import annotations

from amvl_fast.cost.activations import Precision
from amvl_fast.cost.engines import LINK_SHARE, Setup
from amvl_fast.cost.flops import Recipe
from amvl_fast.cost.gpus import GPU, NODE
from amvl_fast.cost.lengths import Lengths
from amvl_fast.cost.memory import USABLE
from amvl_fast.cost.timing import SHARE

ASSUMPTIONS = f"""\
Assumptions; what is not a published figure is our own choice
  time           the larger of operations over {SHARE:.0%} of the dense bfloat16 peak ({{peak:.0f}} TFLOP/s) and
                 bytes moved over the memory's bandwidth ({{bandwidth:.0f}} GB/s); the share is ours. No time for
                 data, launches and evaluation.
  communication  rings over {LINK_SHARE:.0%} (ours) of NVLink's {{link:.0f}} GB/s a GPU, or between nodes of {NODE}
                 GPUs of {{network:.0f}} GB/s a node. fsdp2 and zero3 gather each layer for each call of the
                 decoder and overlap it with computing: the longer counts. What ddp and zero2 send is added.
  operations     of matrix products; attention as {{attention}} computes it. {{recompute}}
  memory         at the beginning of the backward pass, with every sample as long as the longest. Work space is
                 for one layer or for a chunk of logits, an estimate that was not checked, as the vision tower's.
                 It fits if it takes at most {USABLE:.0%} (ours) of {{memory:.0f}} GB.
  AdamW          two moments; {{precision}}{{accumulation}}
  lengths        {{lengths}}
GB is 1e9 bytes. Nothing here was measured on that GPU."""
WHOLE_GRADIENTS = """
  accumulation   fsdp2 keeps whole gradients until a step's last micro-batch, which transformers' Trainer does
                 unless training.accelerator_config is {gradient_accumulation_kwargs: {sync_each_batch: true}}."""


INDENT = "\n" + 17 * " "


def assumptions(gpu: GPU, recipe: Recipe, setup: Setup, lengths: Lengths) -> str:
    mean, longest = lengths.mean, lengths.longest
    source = f"means of {lengths.looked_at} rows of the data file" if lengths.looked_at else "as given"
    described = (
        f"prompt {mean.prompt:.0f} (image tokens {mean.image_tokens:.0f}, images {mean.images:.1f}), answer "
        f"{mean.answer:.0f}, {source}; no padding"
    )
    if lengths.looked_at:
        described += f"{INDENT}The longest of them has {longest.prompt:.0f} and {longest.answer:.0f}."
    return ASSUMPTIONS.format(
        peak=gpu.matrix_flops / 1e12,
        bandwidth=gpu.bandwidth / 1e9,
        link=gpu.link / 1e9,
        network=gpu.network / 1e9,
        memory=gpu.memory / 1e9,
        attention=recipe.attention,
        recompute="Layers run again in the backward pass." if recipe.checkpointing else "Layers keep what they need.",
        precision=in_words(setup.precision(recipe), recipe, setup),
        accumulation=WHOLE_GRADIENTS if setup.keeps_gradients else "",
        lengths=described,
    )


def in_words(precision: Precision, recipe: Recipe, setup: Setup) -> str:
    if setup.is_deepspeed and setup.bf16:
        return "DeepSpeed's bfloat16 weights and gradients, and a float32 copy of the weights."
    weights = "float32" if setup.weights == 4 else "bfloat16"
    note = "" if precision.compute == 2 else f"{INDENT}Times are those of bfloat16 all the same."
    computes = "float32" if precision.compute == 4 else "bfloat16"
    if recipe.lora_rank:
        return f"frozen weights in {weights}, adapters and moments in float32, layers compute in {computes}.{note}"
    return f"weights, gradients and moments in {weights}, layers compute in {computes}.{note}"
