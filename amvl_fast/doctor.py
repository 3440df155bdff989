"""``amvl-fast doctor``: what is installed, what the machine has, and which backends run here."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from amvl_fast.ops import backend_status, kernels_of

CORE = ("amvl-fast", "torch", "triton", "transformers", "numpy", "safetensors")
EXTRAS = {
    "flash": ("flash-attn",),
    "train": ("accelerate", "datasets", "tensorboard"),
    "report": ("matplotlib",),
    "demo": ("easy-vqa",),
}


def report() -> str:
    """The whole report as text."""
    lines = [f"python        {platform.python_version()} on {platform.system()} {platform.machine()}"]
    lines += [f"{name:<13} {installed(name) or 'not installed'}" for name in CORE]
    for extra, names in EXTRAS.items():
        for name in names:
            lines.append(f"{name:<13} {installed(name) or f'not installed: pip install amvl-fast[{extra}]'}")
    lines += ["", f"CPU           {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        lines.append(f"cuda:{i}        {device.name}, {device.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        lines.append("CUDA          no device: training and inference run on the CPU")
    lines.append("")
    for name, reason in backend_status().items():
        status = "available" if reason is None else f"missing: {reason}"
        if name == "cpu" and reason is None:
            status += f" ({kernels_of('cpu').instructions()} instructions)"
        lines.append(f"backend {name:<6} {status}")
    return "\n".join(lines)


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
