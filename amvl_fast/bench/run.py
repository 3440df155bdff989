"""`amvl-fast bench`: run the suite of a checkout, and write what it found as files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from amvl_fast.bench.machine import CHECKOUT, line, slug
from amvl_fast.bench.results import Row, as_csv, as_json
from amvl_fast.errors import AMVLError


def bench(output: Path | None = None, *, quick: bool = False) -> list[Path]:
    """Run `benchmarks/` and write results.json, results.csv, steps.csv and the plots.

    Args:
        output: where to; by default `benchmarks/results/` and a name for the machine, in the checkout.
        quick: a few small sizes of the latent op only, to see that everything works.

    Returns:
        The files that were written. Plots are left out, with a note, where matplotlib is missing.

    Raises:
        AMVLError: there is no checkout, or pytest-benchmark is missing, or the suite did not pass; then nothing is
            written.
    """
    folder = CHECKOUT / "benchmarks"
    if not (folder / "conftest.py").is_file():
        raise AMVLError(
            "bench runs the benchmarks of a checkout and amvl-fast is installed without one: clone the repository, "
            "run `pip install -e .[dev]` in it and then this command."
        )
    missing = [name for name in ("pytest", "pytest_benchmark") if find_spec(name) is None]
    if missing:
        raise AMVLError(f"bench needs {missing[0]}, which is not installed: run `pip install amvl-fast[dev]`.")
    draws = find_spec("matplotlib") is not None
    if not draws:
        print("No plots: matplotlib is not installed (pip install amvl-fast[report]).", file=sys.stderr)

    info, rows, steps, others = collect(run_pytest(folder, quick=quick))
    directory = output or folder / "results" / (slug(info) + "-quick" * quick)
    directory.mkdir(parents=True, exist_ok=True)
    # All of it aside first: an interrupt leaves what was there before.
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=directory) as aside:
        paths = [Path(aside, "results.json"), Path(aside, "results.csv")]
        paths[0].write_text(as_json(info, rows, steps, others), encoding="utf-8")
        paths[1].write_text(as_csv(rows), encoding="utf-8")
        if steps:
            from amvl_fast.bench.step_tables import steps_as_csv

            paths.append(Path(aside, "steps.csv"))
            paths[-1].write_text(steps_as_csv(steps), encoding="utf-8")
        if draws:
            from amvl_fast.bench.plots import write_plots

            paths += write_plots(Path(aside), rows, line(info))
            if steps:
                from amvl_fast.bench.step_plots import write_scaling

                paths += write_scaling(Path(aside, "scaling.png"), steps, line(info))
        return [path.replace(directory / path.name) for path in paths]


def run_pytest(folder: Path, *, quick: bool) -> dict[str, Any]:
    """What pytest-benchmark recorded; its report goes to the terminal."""
    # Not the folder itself: other benchmarks take longer than all of a quick run.
    what = [str(folder / "test_gaussian_dual_kl.py"), "--quick"] if quick else [str(folder)]
    search = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as scratch:
        record = Path(scratch, "record.json")
        command = [sys.executable, "-m", "pytest", *what, f"--benchmark-json={record}", "-p", "no:cacheprovider"]
        done = subprocess.run(command, cwd=CHECKOUT, env={**os.environ, "PYTHONPATH": search}, check=False)
        if done.returncode != 0 or not record.is_file():
            raise AMVLError("the benchmarks did not pass, so nothing is written; what went wrong is printed above.")
        return json.loads(record.read_text(encoding="utf-8"))


def collect(record: dict[str, Any]) -> tuple[dict[str, Any], list[Row], list[Row], list[Row]]:
    """The machine, the rows of the ops, those of the step, and in pytest-benchmark's figures everything else."""
    found = record["benchmarks"]
    rows = [one["extra_info"] for one in found if "op" in one["extra_info"]]
    steps = [one["extra_info"] for one in found if "prompt" in one["extra_info"]]
    others = [
        {
            "group": one["group"],
            "name": one["name"],
            "p50_ms": 1e3 * one["stats"]["median"],
            "rounds": one["stats"]["rounds"],
        }
        for one in found
        if not {"op", "prompt"} & one["extra_info"].keys()
    ]
    return record["machine_info"]["amvl_fast"], rows, steps, others
