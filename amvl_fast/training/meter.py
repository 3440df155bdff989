"""What happened since the last line of the log: losses, how fast it went, and how much memory it took."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from amvl_fast.cost import peak_flops

# Of a model's output: what it divided by the whole accumulated batch, so that parts add up.
LOSSES = ("ntp_loss", "prior_ntp_loss", "forward_kl", "reverse_kl")
SLOTS = ("forward_kl", "reverse_kl")


class Counts(NamedTuple):
    """Of the whole accumulated batch, over its parts and over processes; 0-dimensional tensors, so that nobody waits.

    Attributes:
        answer_tokens, samples: what losses are averaged over.
        tokens: of prompts and answers, padding left out.
        image_tokens: how many of them stand for images.
    """

    answer_tokens: Tensor
    samples: Tensor
    tokens: Tensor
    image_tokens: Tensor

    @classmethod
    def of(cls, batches: Sequence[dict[str, Any]], accelerator: Accelerator, image_token_id: int) -> Counts:
        own = torch.zeros(4, dtype=torch.int64, device=accelerator.device)
        for batch in batches:
            labels = batch["labels"]
            own[0] += (labels != -100).sum()
            own[1] += len(labels)
            own[2] += batch["attention_mask"].sum() if "attention_mask" in batch else labels.numel()
            own[3] += (batch["input_ids"] == image_token_id).sum()
        return cls(*accelerator.reduce(own, "sum").unbind())


class Meter:
    """Adds up over steps, and over processes when it is read."""

    def __init__(self, accelerator: Accelerator, flops: Callable[..., float] | None = None) -> None:
        """`flops` gives the model's operations in a batch of so many, see `amvl_fast.cost.training_flops`."""
        self.accelerator = accelerator
        self._flops = flops
        self.reset()

    def reset(self) -> None:
        self._losses: dict[str, Tensor] = {}
        self._total: Counts | None = None
        self._last: Counts | None = None
        self._steps = 0
        self._start = time.perf_counter()

    def begin_step(self, counts: Counts) -> None:
        self._total = counts if self._total is None else Counts(*map(torch.add, self._total, counts))
        self._last, self._steps = counts, self._steps + 1

    def add(self, outputs: Any) -> None:
        """The outputs of one part of a step's batch."""
        parts = {name: outputs[name] for name in LOSSES if outputs.get(name) is not None}
        for name in SLOTS:
            per_slot = outputs.get(f"{name}_per_slot")
            if per_slot is not None and self._last is not None:
                parts[f"{name}_slot"] = per_slot.sum(0) / self._last.samples
        for name, value in parts.items():
            self._losses[name] = self._losses.get(name, 0.0) + value.detach()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For what is not training."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Averages over the steps since the last reading; by all processes together."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        steps = max(self._steps, 1)
        logs: dict[str, float] = {}
        for name, added in self._losses.items():
            mean = (self.accelerator.reduce(added, "sum") / steps).tolist()
            logs |= {f"{name}_{i}": value for i, value in enumerate(mean)} if isinstance(mean, list) else {name: mean}
        if self._total is not None:
            total = self._total
            logs["samples_per_second"] = int(total.samples) / seconds
            logs["tokens_per_second"] = int(total.tokens) / seconds
            logs |= self._utilisation(total, seconds)
        logs["peak_memory_gib"] = self._peak_memory() / 2**30
        self.reset()
        return logs

    def _utilisation(self, total: Counts, seconds: float) -> dict[str, float]:
        """Model operations a second and device, and as a share of the device's peak where that is published."""
        if self._flops is None:
            return {}
        flops = self._flops(
            samples=int(total.samples),
            prompt_tokens=int(total.tokens - total.answer_tokens),
            answer_tokens=int(total.answer_tokens),
            image_tokens=int(total.image_tokens),
            images=int(total.samples),
        )
        each = flops / seconds / self.accelerator.num_processes
        device = self.accelerator.device
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        return {"model_tflops_per_second": each / 1e12} | ({"model_flops_utilisation": each / peak} if peak else {})

    def _peak_memory(self) -> float:
        """Bytes, of the process that took most: on its GPU, or resident where there is none."""
        device = self.accelerator.device
        own = (
            torch.cuda.max_memory_allocated(device)
            if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        return float(self.accelerator.gather(torch.tensor([own], dtype=torch.float64, device=device)).max())
