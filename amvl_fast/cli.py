"""The command ``amvl-fast``."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from amvl_fast.errors import AMVLError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; a user's mistake ends in one line on stderr and status 2, an interrupted run in status 130."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except AMVLError as error:
        from amvl_fast.data.worker_errors import sentence

        tqdm.write(f"amvl-fast: {sentence(error)}", file=sys.stderr)  # on a line of its own, if a bar stands there
        return 2
    except KeyboardInterrupt:
        return 130


# As in `amvl_fast.cost.engines`, which is imported with its verb.
ENGINES = ("single", "ddp", "fsdp2", "zero2", "zero3")


def positive(text: str) -> int:
    """The type of an argument that counts something."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="amvl-fast", description="Latent reasoning for vision-language models.")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = verbs.add_parser("train", help="train a configuration, or go on where it stopped")
    verb.add_argument("config", help="YAML file")
    verb.add_argument("overrides", nargs="*", metavar="section.key=value")
    verb.set_defaults(run=run_train)

    verb = verbs.add_parser("evaluate", help="evaluate a run on its test rows and write its report")
    verb.add_argument("run_dir", metavar="RUN")
    verb.add_argument("--baseline", metavar="RUN", help="an evaluated run to set beside this one")
    verb.add_argument("--rows", type=positive, help="evaluate this many test rows only, drawn with the seed")
    verb.add_argument("--latent-temperature", type=float, help="spread of the latents; 0 answers from their mean")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--batch-size", type=positive)
    verb.set_defaults(run=run_evaluate)

    verb = verbs.add_parser("generate", help="answer a question about an image")
    verb.add_argument("run_dir", metavar="RUN")
    verb.add_argument("--image", required=True, metavar="FILE")
    verb.add_argument("--question", required=True, metavar="TEXT")
    verb.add_argument("--latent-temperature", type=float)
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--max-new-tokens", type=positive, default=64)
    verb.set_defaults(run=run_generate)

    verb = verbs.add_parser("plan", help="predict memory and time of a configuration on GPUs, without any")
    verb.add_argument("config", help="YAML file")
    verb.add_argument("overrides", nargs="*", metavar="section.key=value")
    verb.add_argument("--gpu", required=True, metavar="NAME", help="a100, h100, h200 or b200")
    verb.add_argument("--count", type=positive, default=1, help="how many")
    verb.add_argument("--engine", choices=ENGINES, help="by default what the configuration asks for")
    verb.add_argument("--prompt-tokens", type=positive, metavar="N", help="of a row; by default read off its data")
    verb.add_argument("--answer-tokens", type=positive, metavar="N")
    verb.add_argument("--image-tokens", type=positive, metavar="N", help="how many of the prompt's are of images")
    verb.add_argument("--images", type=positive, default=1, metavar="N", help="of a row")
    verb.add_argument("--rows", type=positive, metavar="N", help="of an epoch; by default those of the data")
    verb.set_defaults(run=run_plan)

    verb = verbs.add_parser(
        "bench", help="measure gaussian_dual_kl and the AMVL step beside their peers, with tables and plots"
    )
    verb.add_argument(
        "--output",
        metavar="DIR",
        help="where to write files; by default a folder for this machine, and with --compile nowhere",
    )
    verb.add_argument("--quick", action="store_true", help="few and small cases only, to see that everything works")
    verb.add_argument(
        "--compile",
        action="store_true",
        help="compile the GPU kernels instead, without a GPU, and print a report on their code",
    )
    verb.set_defaults(run=run_bench)

    verb = verbs.add_parser("doctor", help="versions, devices, and which backends run here")
    verb.set_defaults(run=run_doctor)
    return top


# Imports stand in the verbs: doctor must run where the extras that the others need are missing.


def quiet() -> None:
    """Leave transformers' bars for loading and saving out: they last an instant and tear the training's own bar."""
    import torch
    from transformers.utils import logging

    if not torch.cuda.is_available():  # DeepSpeed, where it is installed, looks for a GPU in every run and says so
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Its new name is not known to the oldest transformers that will do.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)
    logging.disable_progress_bar()


def run_train(arguments: argparse.Namespace) -> int:
    from amvl_fast.training import read_config, train

    quiet()
    stopped_at = train(read_config(arguments.config, arguments.overrides))
    if stopped_at is None:
        return 0
    print(f"Stopped after step {stopped_at}; the same command goes on from there.")
    return 130


def run_evaluate(arguments: argparse.Namespace) -> int:
    from amvl_fast.report import evaluate_run

    quiet()
    path = evaluate_run(
        arguments.run_dir,
        baseline=arguments.baseline,
        rows=arguments.rows,
        latent_temperature=arguments.latent_temperature,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
    )
    print(path)
    return 0


def run_generate(arguments: argparse.Namespace) -> int:
    from amvl_fast.data import ChatCollator, open_image
    from amvl_fast.evaluation import answer
    from amvl_fast.training import load_run

    quiet()
    image = open_image(arguments.image)
    model, processor, _ = load_run(arguments.run_dir)
    content = [{"type": "image"}, {"type": "text", "text": arguments.question}]
    row = {"messages": [{"role": "user", "content": content}], "images": [image]}
    options = {"latent_temperature": arguments.latent_temperature, "seed": arguments.seed}
    print(answer(model, ChatCollator(processor), [row], max_new_tokens=arguments.max_new_tokens, **options)[0])
    return 0


def run_plan(arguments: argparse.Namespace) -> int:
    from amvl_fast.cost.report import plan
    from amvl_fast.training import read_config

    quiet()
    lengths = ("prompt_tokens", "answer_tokens", "image_tokens", "images", "rows")
    print(
        plan(
            read_config(arguments.config, arguments.overrides),
            gpu=arguments.gpu,
            count=arguments.count,
            engine=arguments.engine,
            **{name: getattr(arguments, name) for name in lengths},
        )
    )
    return 0


def run_bench(arguments: argparse.Namespace) -> int:
    output = Path(arguments.output) if arguments.output else None
    if output is not None and output.exists() and not output.is_dir():
        raise AMVLError(f"--output {output} is not a directory; name one, it is made where it does not exist.")
    if arguments.compile:
        from amvl_fast.bench.compile_report import report

        print(report(output, wide=not arguments.quick))
        return 0
    from amvl_fast.bench.run import bench

    for path in bench(output, quick=arguments.quick):
        print(path)
    return 0


def run_doctor(arguments: argparse.Namespace) -> int:
    from amvl_fast.doctor import report

    print(report())
    return 0
