"""What the figures were taken on, in one line."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import amvl_fast
from amvl_fast.doctor import installed

CHECKOUT = Path(amvl_fast.__file__).resolve().parents[1]


def machine(device: torch.device) -> dict[str, Any]:
    """Processor or GPU, clocks, threads, versions, and the commit in a checkout.

    Ask before measuring: the load is what others leave to do, and more than a trace of it spoils times on a CPU.
    """
    if device.type == "cuda":
        name, clocks = torch.cuda.get_device_name(device), gpu_clocks(device)
    else:
        name, clocks = processor(), cpu_clock()
    return {
        "device": name,
        "clocks": clocks,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
        **{name.replace("-", "_"): installed(name) for name in ("torch", "triton")},
        "amvl_fast": amvl_fast.__version__,
        "commit": commit(),
    }


def line(info: dict[str, Any]) -> str:
    """The same in one line."""
    cuda = f" with CUDA {info['cuda']}" if info["cuda"] else ""
    parts = [
        f"{info['device']} at {info['clocks']}",
        f"{info['threads']} threads ({info['instructions']}), load {info['load']}",
        f"Python {info['python']}, torch {info['torch']}{cuda}, triton {info['triton'] or 'missing'}",
        f"amvl-fast {info['amvl_fast']}" + (f" at commit {info['commit']}" if info["commit"] else ""),
    ]
    return "; ".join(parts)


def slug(info: dict[str, Any]) -> str:
    """A folder's name for the machine."""
    words = info["device"] if info["cuda"] else f"{info['device']} {info['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def processor() -> str:
    """The processor's name, where the system tells it."""
    found = re.search(r"^model name\s*:\s*(.+)$", read("/proc/cpuinfo"), re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def cpu_clock() -> str:
    """Of the first core and at this moment: it moves, which is why speed is told in ratios."""
    found = re.search(r"^cpu MHz\s*:\s*([\d.]+)$", read("/proc/cpuinfo"), re.MULTILINE)
    return f"{float(found.group(1)) / 1e3:.1f} GHz" if found else "an unknown clock"


def gpu_clocks(device: torch.device) -> str:
    """Of processors and memory, now and at most."""
    query = "clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem"
    which = str(torch.cuda.get_device_properties(device).uuid)
    which = which if which.startswith("GPU-") else f"GPU-{which}"
    text = output("nvidia-smi", f"--id={which}", f"--query-gpu={query}", "--format=csv,noheader,nounits")
    numbers = [number.strip() for number in (text or "").split(",")]
    if len(numbers) != 4:
        return "unknown clocks"
    return "{} of {} MHz, memory {} of {} MHz".format(*numbers)


def commit() -> str | None:
    """The checkout's commit, with a plus behind it if files have changed since; None outside of a checkout."""
    if not (CHECKOUT / ".git").exists():
        return None
    head = output("git", "-C", str(CHECKOUT), "rev-parse", "--short", "HEAD")
    changed = output("git", "-C", str(CHECKOUT), "status", "--porcelain", "--untracked-files=no")
    return head + ("+" if changed else "") if head else None


def output(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
