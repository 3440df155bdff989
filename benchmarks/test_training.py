"""A step of `amvl-fast train`, data loading included, beside the bare step on the same batches.

Both take turns in one process. The Trainer runs as a run does by default, on easy-VQA's images of 64 x 64 pixels: chat
rows of a JSONL file, PNG files decoded as they are met, gradients clipped, a line of the log every ten steps. Between
stretches of it, with its clock standing, a copy of the model runs each stretch's batches in a plain loop: forward,
backward, clipping, the same optimizer, `zero_grad`. No time is asserted: the table says where a step is within 5% of
the bare one.

Workers that load data take a core from a step of two threads, so one worker is measured beside one thread, too. The
last column compares processor time of this process alone, which other work on the machine moves less: with workers, it
is what a step would cost if they had a core of their own.

On a machine with other work, OMP_WAIT_POLICY=PASSIVE keeps threads from spinning for a core that is taken; times then
remain usable.
"""

import copy
import time
from dataclasses import dataclass

import datasets
import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from amvl_fast.bench.machine import line, machine
from amvl_fast.bench.measure import percentile
from amvl_fast.data import ChatCollator, ChatDataset, write_easy_vqa
from amvl_fast.data.rows import text_of
from amvl_fast.demo import SIZES
from amvl_fast.objective import Objective
from amvl_fast.tiny import build_tiny_base
from amvl_fast.training import AMVLTrainer
from amvl_fast.training.config import DataSection, ModelSection, RunConfig
from amvl_fast.training.loading import load_model, load_processor
from amvl_fast.training.run import training_arguments

STEPS = 10  # of a stretch: one line of the log falls into each
SECONDS, ROUNDS = 5, 3  # on a case, and at least; the first round is left out

DEMO, SMALL = "the demo's", "4 layers of 256"
MODELS = {
    DEMO: (SIZES, dict(num_latents=4, latent_dim=32)),
    # That of `amvl_fast.bench.steps`, but for patches that fit small images.
    SMALL: (
        dict(hidden_size=256, num_layers=4, num_heads=8, num_key_value_heads=4, vision_hidden_size=32, vision_depth=1),
        dict(num_latents=8),
    ),
}


@dataclass(frozen=True)
class Case:
    model: str
    batch: int
    workers: int
    threads: int

    @property
    def name(self) -> str:
        return f"{self.model}, batch {self.batch}, {self.workers} workers, {self.threads} threads"


CASES = [
    Case(model, batch, workers, threads)
    for model, batch, ways in ((DEMO, 32, 2), (SMALL, 8, 3), (SMALL, 32, 2))
    for workers, threads in ((0, 2), (1, 1), (1, 2), (2, 2))[:ways]
]


def clocks():
    """Seconds that passed, and those of all threads of this process, as one vector."""
    return np.array([time.perf_counter(), time.process_time()])


class Recording(AMVLTrainer):
    """Keeps the batches that it was given."""

    seen: list

    def get_batch_samples(self, *args, **kwargs):
        batches, count = super().get_batch_samples(*args, **kwargs)
        self.seen += [dict(batch) for batch in batches]
        return batches, count


class Turns(TrainerCallback):
    """Times stretches of the Trainer's steps and, after each, the bare loop on its batches."""

    def __init__(self, trainer, *, untimed):
        """`untimed`: steps before each stretch, for what the workers loaded while the bare loop ran."""
        self.trainer, self.untimed = trainer, untimed
        self.model = copy.deepcopy(trainer.model).train()
        kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, self.model)
        self.optimizer = kind([p for p in self.model.parameters() if p.requires_grad], **options)
        self.weights = trainer.objective.at(1, 1)
        self.times = []
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, **kwargs):
        self.end = time.perf_counter() + SECONDS

    def on_step_end(self, args, state, control, **kwargs):
        place = state.global_step % (self.untimed + STEPS)
        if place == self.untimed:
            self.trainer.seen = []
            self.start = clocks()
        elif place == 0:
            own = clocks() - self.start
            batches = [self.inputs(batch) for batch in self.trainer.seen]
            time.sleep(0.3)  # until the workers have filled their queue and are still
            self.bare(batches[:2])
            start = clocks()
            self.bare(batches)
            self.times.append((own / STEPS, (clocks() - start) / STEPS))
            if len(self.times) >= ROUNDS and time.perf_counter() > self.end:
                control.should_training_stop = True

    @staticmethod
    def inputs(batch):
        return {name: value for name, value in batch.items() if name != "sample_ids"}

    def bare(self, batches):
        for batch in batches:
            self.model(**batch, **self.weights).loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A directory with easy-VQA and the models."""
    root = tmp_path_factory.mktemp("training")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        files = write_easy_vqa(root)
        messages = ChatDataset(files["train"], max_rows=2000).column("messages")
        texts = sorted({text_of(message) for row in messages for message in row})
        for name, (sizes, _) in MODELS.items():
            build_tiny_base(root / name, texts, **sizes)
        yield root


@pytest.fixture(scope="module")
def table(pytestconfig):
    """Rows to be printed at the end."""
    info = machine(torch.device("cpu"))
    rows = [
        "| model, batch, workers, threads | bare step | step of a run | times bare (quartiles) | in processor time |",
        "|---|---|---|---|---|",
    ]
    yield rows
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n\n" + line(info) + "\n\n" + "\n".join(rows))


@pytest.fixture
def threads():
    """Sets how many; what it was comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("training_case", CASES, ids=lambda case: case.name)
def test_training(inputs, tmp_path, table, threads, training_case):
    case = training_case
    threads(case.threads)
    sizes, latents = MODELS[case.model]
    config = RunConfig(
        model=ModelSection(str(inputs / case.model)),
        data=DataSection(str(inputs / "train.jsonl")),
        objective=Objective(),
        latents=latents,
        training={
            "output_dir": str(tmp_path / "run"),
            "max_steps": 100_000,
            "per_device_train_batch_size": case.batch,
            "dataloader_num_workers": case.workers,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
        },
    )
    processor = load_processor(config)
    rows = ChatDataset(config.data.train, special_tokens=processor.tokenizer.all_special_tokens)
    trainer = Recording(
        model=load_model(config, processor, rows[0]),
        args=training_arguments(config),
        data_collator=ChatCollator(processor),
        train_dataset=rows,
        processing_class=processor,
    )
    trainer.seen = []
    turns = Turns(trainer, untimed=2 * case.workers + 2)
    trainer.train()
    table.append(row_of(case, turns.times[1:]))


def row_of(case, times):
    own, bare = (1e3 * np.median([each[0] for each in taken]) for taken in zip(*times, strict=True))
    ratios = [own / bare for own, bare in times]
    low, ratio, high = (percentile([float(wall) for wall, _ in ratios], percent) for percent in (25, 50, 75))
    cpu = np.median([cpu for _, cpu in ratios])
    return f"| {case.name} | {bare:.0f} ms | {own:.0f} ms | **{ratio:.2f}** ({low:.2f} to {high:.2f}) | {cpu:.2f} |"
