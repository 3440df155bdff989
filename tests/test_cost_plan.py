"""What `amvl-fast plan` prints, for Qwen2.5-VL-7B by its published sizes; no weight of it is made."""

import json
from pathlib import Path

import pytest
import torch

from amvl_fast.cost import Recipe, Sample, read_sizes, step_flops
from amvl_fast.cost.engines import Setup
from amvl_fast.cost.gpus import GPUS
from amvl_fast.cost.lengths import read_lengths
from amvl_fast.cost.memory import USABLE, memory_bytes
from amvl_fast.cost.report import plan
from amvl_fast.cost.timing import SHARE, moved_bytes, step_time
from amvl_fast.errors import AMVLError
from amvl_fast.tiny import build_tiny_base
from amvl_fast.training.config import read_config

QWEN_7B = {
    "model_type": "qwen2_5_vl",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "image_token_id": 151655,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}
SAMPLE = Sample(1500, 150, 1296)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen")
    (directory / "config.json").write_text(json.dumps(QWEN_7B))
    return directory


@pytest.fixture(scope="module")
def sizes(backbone):
    return read_sizes(str(backbone))


@pytest.fixture
def configured(backbone):
    def read(*overrides):
        path = Path(__file__).parent.parent / "configs" / "qwen2_5_vl_7b.yaml"
        return read_config(path, [f"model.backbone={backbone}", *overrides])

    return read


def test_qwen_has_its_published_sizes(sizes):
    assert sizes.parameters.backbone == 8_292_166_656 and sizes.stored == 2
    assert sizes.decoder.weights == 28 * sizes.decoder.layer_weights + 3584 * 152_064
    # Two heads of 2 x 512 with biases, the projection with bias and gain, 8 slots and an end.
    assert sizes.parameters.latents == 2 * 1024 * 3585 + 3584 * 514 + 9 * 3584
    vision = sizes.vision
    assert (vision.window, vision.full_layers, vision.layers, vision.patches_per_token) == (64, 4, 32, 4)
    assert vision.patch_weights == 32 * (4 * 1280**2 + 3 * 1280 * 3420)
    assert vision.token_weights == 5120**2 + 5120 * 3584 and vision.embedding_weights == 1280 * 3 * 2 * 14**2


def test_a_step_of_qwen(sizes):
    parts = step_flops(sizes, SAMPLE, Recipe())
    rows = 1500 + 8 + 158 + 159
    unread = 4 * 1500 * (sizes.decoder.layer_weights - sizes.decoder.kv_weights)
    linear = parts["decoder, linear maps"]
    assert linear.forward + linear.backward == 6 * rows * 28 * sizes.decoder.layer_weights - unread
    patches = 4 * 1296
    tower = 2 * patches * (sizes.vision.patch_weights + sizes.vision.embedding_weights)
    tower += 2 * 1296 * sizes.vision.token_weights + 4 * patches * 1280 * (4 * patches + 28 * 64)
    assert parts["vision tower"].total == tower and parts["connector"].total == 0


def test_memory_of_a_layer_and_what_is_shared(sizes):
    setup = Setup("single", 1, 2, 1, 2, True)
    off = memory_bytes(sizes, SAMPLE, Recipe(), setup)
    on = memory_bytes(sizes, SAMPLE, Recipe(checkpointing=True), setup)
    assert on["prompt keys and values"] == 2 * 28 * 2 * 2 * 512 * 1500 and off["prompt keys and values"] == 0
    assert on["decoder layers"] < off["decoder layers"] / 10
    three = memory_bytes(sizes, SAMPLE, Recipe("three_pass"), setup)
    assert three["logits"] == 2 * 150 * 152_064 * 4 and off["logits"] == 0
    assert three["decoder layers"] > 2 * off["decoder layers"]
    lora = memory_bytes(sizes, SAMPLE, Recipe(lora_rank=8), setup)
    assert lora["gradients"] < off["gradients"] / 100 and lora["optimiser"] < off["optimiser"] / 100


def test_time_is_the_slower_of_operations_and_bytes_and_what_is_sent(sizes):
    gpu, recipe = GPUS["H100 SXM"], Recipe()
    one = step_time(sizes, SAMPLE, recipe, Setup("single", 1, 8, 2, 4, True), gpu)
    total = sum(part.total for part in step_flops(sizes, SAMPLE, recipe).values())
    assert one.compute == pytest.approx(16 * total / (SHARE * 989e12)) and one.communication == 0
    assert one.step == one.compute + one.optimiser > one.traffic
    short, setup = Sample(4, 1), Setup("single", 1, 1, 1, 4, True)
    bound = step_time(sizes, short, recipe, setup, gpu)
    assert bound.step == bound.traffic + bound.optimiser
    assert bound.traffic == moved_bytes(sizes, short, recipe, setup) / 3350e9
    ddp = step_time(sizes, SAMPLE, recipe, Setup("ddp", 8, 8, 2, 4, True), gpu)
    assert ddp.step == ddp.compute + ddp.communication + ddp.optimiser
    fsdp2 = step_time(sizes, SAMPLE, recipe, Setup("fsdp2", 64, 1, 2, 4, True), gpu)
    assert fsdp2.step == max(fsdp2.compute, fsdp2.communication) + fsdp2.optimiser
    assert fsdp2.optimiser == pytest.approx(one.optimiser / 64)


LENGTHS = dict(prompt_tokens=1500, answer_tokens=150, image_tokens=1296)


def test_the_report(configured, monkeypatch):
    made = []
    monkeypatch.setattr(torch.nn.Parameter, "numel", lambda p, count=torch.Tensor.numel: made.append(p) or count(p))
    text = plan(configured(), gpu="h100", count=64, engine="fsdp2", rows=100_000, **LENGTHS)
    assert made and all(parameter.is_meta for parameter in made)
    assert text.startswith("Predicted, not measured") and "64 x H100 SXM, fsdp2" in text
    assert "8,292,166,656 parameters" in text and "= 512 a step; activation checkpointing on" in text
    for words in (
        "prompt keys and values",
        "optimiser",
        "hours for 100,000 rows",
        "Both fit",
        "sync_each_batch",
        "ours",
    ):
        assert words in text, words
    assert all(
        len(line) <= 120 for line in text.splitlines() if "parameters of" not in line and "measured:" not in line
    )
    lines = [line.split() for line in text.splitlines()]
    hours = next([float(cell) for cell in line[-2:]] for line in lines if line[:1] == ["hours"])
    steps = next([float(cell) for cell in line[-2:]] for line in lines if line[:2] == ["a", "step"])
    assert hours == [pytest.approx(step * 100_000 / 512 / 3600, abs=0.006) for step in steps]


def test_what_does_not_fit_is_said(configured):
    whole = plan(configured(), gpu="h100", **LENGTHS)
    assert "Neither fits: at least" in whole and "give --rows" in whole and ", single, training" in whole
    lora = plan(configured("lora.r=16", "model.dtype=bfloat16"), gpu="h100", **LENGTHS)
    assert "Both fit" in lora and "LoRA of rank 16" in lora and "adapters and moments in float32" in lora
    assert USABLE < 1


def test_the_engine_is_the_configuration_s(configured, tmp_path):
    def heading(*overrides):
        return plan(configured(*overrides), gpu="b200", count=16, **LENGTHS).splitlines()[0]

    assert ", ddp," in heading("training.fsdp=null", "training.deepspeed=null")
    assert ", fsdp2," in heading("training.fsdp=true", "training.deepspeed=null")
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    assert ", zero3," in heading("training.fsdp=null", f"training.deepspeed={path}")
    path.write_text("{}")
    with pytest.raises(AMVLError, match="--engine"):
        heading("training.fsdp=null", f"training.deepspeed={path}")


@pytest.mark.parametrize(
    "overrides, options, words",
    [
        ([], dict(gpu="gtx"), "use one of: A100"),
        (["model.backbone=/nowhere"], {}, "config.json"),
        (["objective.name=no_latents"], {}, "only runs with latents"),
        ([], dict(answer_tokens=None), "go together"),
        ([], dict(image_tokens=1501), "no more image tokens"),
        ([], dict(prompt_tokens=None, answer_tokens=None, image_tokens=None), "--prompt-tokens"),
        ([], dict(count=2, engine="single"), "one GPU"),
    ],
)
def test_mistakes_are_one_sentence(configured, overrides, options, words):
    with pytest.raises(AMVLError, match=words) as caught:
        plan(configured(*overrides), **{"gpu": "h100", **LENGTHS, **options})
    assert "\n" not in str(caught.value)


def test_lengths_are_read_off_the_data(tmp_path):
    build_tiny_base(tmp_path / "base", ["what colour is it? red blue"])
    from PIL import Image

    Image.new("RGB", (64, 32)).save(tmp_path / "0.png")
    question = [{"type": "image"}, {"type": "text", "text": "what colour is it?"}]
    rows = []
    for answer in ("red", "red blue red blue"):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": messages, "images": ["0.png"]}))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "run.yaml").write_text(
        f"model: {{backbone: {tmp_path}/base}}\ndata: {{train: {tmp_path}/rows.jsonl}}\n"
        f"training: {{output_dir: {tmp_path}/run, max_steps: 1}}\n"
    )
    config = read_config(tmp_path / "run.yaml")
    lengths = read_lengths(config)
    assert (lengths.rows, lengths.looked_at) == (2, 2)
    assert lengths.mean.image_tokens == 64 * 32 / 16**2 and lengths.mean.images == 1
    assert lengths.longest.prompt == lengths.mean.prompt > 8 and lengths.longest.answer > lengths.mean.answer > 1
    assert "hours for 2 rows" in plan(config, gpu="H200")
