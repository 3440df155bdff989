"""The demo's own pieces: what it prepares, and its table over seeds."""

import json

from transformers import AutoConfig, AutoProcessor

from amvl_fast.data import ChatDataset
from amvl_fast.demo import prepare, seed_table


def test_prepare_writes_data_and_a_base_that_transformers_loads_and_keeps_them(tmp_path):
    prepare(tmp_path)
    row = ChatDataset(tmp_path / "data" / "test.jsonl")[0]
    processor = AutoProcessor.from_pretrained(tmp_path / "init")
    assert AutoConfig.from_pretrained(tmp_path / "init").model_type == "qwen2_5_vl"
    # Trained on the data's own words: a question is a handful of tokens, not one a letter.
    question = next(part["text"] for part in row["messages"][0]["content"] if part["type"] == "text")
    assert len(processor.tokenizer(question).input_ids) <= len(question.split()) + 1
    before = (tmp_path / "init" / "model.safetensors").stat().st_mtime_ns
    prepare(tmp_path)
    assert (tmp_path / "init" / "model.safetensors").stat().st_mtime_ns == before


def test_the_table_gives_mean_and_range_over_seeds(tmp_path):
    latents = {"leakage": 0.5, "forward_kl_per_slot": [1.0, 2.0], "active_units_prior": [3, 4], "swap_cost": 0.25}
    for name, accuracy, more in (("plain-0", 0.7, {}), ("plain-1", 0.9, {}), ("amvl-0", 0.8, latents)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluation.json").write_text(json.dumps({"metrics": {"accuracy": accuracy, **more}}))
    lines = seed_table(tmp_path).splitlines()
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    leakage, kl, units, swap = (
        "0.500 (0.500 to 0.500)",
        "3.000 (3.000 to 3.000)",
        "7 (7 to 7)",
        "0.250 (0.250 to 0.250)",
    )
    assert cells == ["amvl", "1", "80.0 (80.0 to 80.0)", leakage, kl, units, swap]
    assert lines[3].startswith("| plain | 2 | 80.0 (70.0 to 90.0) |")
