"""What a call costs besides time: peak memory, kernel launches; and what a plain copy of memory reaches."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def peak_memory(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a call has allocated at its peak, results included and what existed before it left out.

    It counts what goes through PyTorch's allocators. On the CPU the profiler records each allocation, also those of
    compiled code, which no hook on operators sees.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    live = peak = 0
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


def launches(run: Callable[[], Any], device: torch.device) -> int:
    """Kernels that ran on the GPU, those that draw noise or a seed among them."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize(device)
    kernels = [event for event in profiler.events() or () if event.device_type == DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in kernels)


class Stopwatch:
    """Times one call on the device, and how long the host was busy with it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.scratch = torch.empty(2**28, dtype=torch.uint8, device=device)

    def __call__(self, run: Callable[[], Any]) -> tuple[float, float]:
        """Seconds on the device and seconds on the host; the results are freed outside the clock."""
        if self.device.type != "cuda":
            begin = time.perf_counter()
            results = run()
            seconds = time.perf_counter() - begin
            del results
            return seconds, seconds
        # Empties the cache, and gives the host a head start, 0.1 ms on a fast GPU and more on others: a call that is
        # launched within it is timed for what the device does, and a longer one also for its wait for the host.
        self.scratch.zero_()
        self.start.record()
        begin = time.perf_counter()
        results = run()
        host = time.perf_counter() - begin
        self.end.record()
        torch.cuda.synchronize(self.device)
        del results
        return self.start.elapsed_time(self.end) / 1e3, host


class CopyBandwidth:
    """Bytes a second that `Tensor.copy_` reads and writes, between buffers that no cache holds."""

    def __init__(self, device: torch.device) -> None:
        size = 2**29 if device.type == "cuda" else 2**27
        self.buffers = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self.stopwatch = Stopwatch(device)
        self.measure()

    def measure(self, rounds: int = 3) -> list[float]:
        target, source = self.buffers
        return [2 * source.numel() / self.stopwatch(lambda: target.copy_(source))[0] for _ in range(rounds)]
