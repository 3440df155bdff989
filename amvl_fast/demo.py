"""What the demo needs besides ordinary ``amvl-fast`` commands (see the Makefile).

``python -m amvl_fast.demo prepare DIRECTORY`` writes easy-VQA as chat files to ``DIRECTORY/data`` and an untrained tiny
Qwen2.5-VL to ``DIRECTORY/init``; ``python -m amvl_fast.demo table DIRECTORY`` compares evaluated runs over seeds.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from amvl_fast.cli import quiet
from amvl_fast.data import ChatDataset, write_easy_vqa
from amvl_fast.data.rows import text_of
from amvl_fast.tiny import build_tiny_base

# Small enough for minutes on two cores; deep enough to learn colours first and shapes later.
SIZES = dict(hidden_size=64, num_layers=3, num_heads=4, num_key_value_heads=2, vision_hidden_size=64, vision_depth=2)


def prepare(directory: str | Path) -> None:
    """Write the data and the untrained base; what is there already is kept."""
    directory = Path(directory)
    files = write_easy_vqa(directory / "data")
    if (directory / "init" / "config.json").is_file():
        return
    rows = ChatDataset(files["train"])
    texts = {text_of(message) for messages in rows.column("messages") for message in messages}
    build_tiny_base(directory / "init", sorted(texts), **SIZES)


def seed_table(directory: str | Path) -> str:
    """Mean and spread over seeds of the evaluated runs ``directory/NAME-SEED``, as a Markdown table."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(Path(directory).glob("*-*/evaluation.json")):
        runs.setdefault(path.parent.name.rpartition("-")[0], []).append(json.loads(path.read_text())["metrics"])
    heads = ["", "seeds", "accuracy, %", "leakage", "forward KL", "active units, prior", "swap cost"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, metrics in runs.items():
        columns = [spread([100 * m["accuracy"] for m in metrics], 1)]
        if "leakage" in metrics[0]:
            columns.append(spread([m["leakage"] for m in metrics], 3))
            columns.append(spread([sum(m["forward_kl_per_slot"]) for m in metrics], 3))
            columns.append(spread([sum(m["active_units_prior"]) for m in metrics], 0))
            columns.append(spread([m["swap_cost"] for m in metrics], 3))
        columns += [""] * (5 - len(columns))
        lines.append(f"| {name} | {len(metrics)} | {' | '.join(columns)} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    """The mean, and the smallest and largest value; no minus zero."""
    summary = (statistics.mean(values), min(values), max(values))
    mean, low, high = (f"{round(value, digits) + 0.0:,.{digits}f}" for value in summary)
    return f"{mean} ({low} to {high})"


if __name__ == "__main__":
    if sys.argv[1] == "table":
        print(seed_table(sys.argv[2]))
    else:
        quiet()
        prepare(sys.argv[2])
