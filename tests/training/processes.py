"""Trains several configurations in one group of processes: ``torchrun --nproc-per-node 2 processes.py CONFIG ...``.

A configuration may be followed by overrides; ``--`` ends it. The first that is not trained to its end ends it all.
"""

import contextlib
import itertools
import sys

from accelerate.state import AcceleratorState, DistributedType, GradientState

from amvl_fast.cli import main

set_up = AcceleratorState.__init__


def set_up_for_cpus(self, *args, fsdp_plugin=None, **kwargs):
    """accelerate shards models on accelerators only, and leaves its plugin out elsewhere; PyTorch does not mind."""
    set_up(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


if __name__ == "__main__":
    with contextlib.suppress(ImportError):
        import deepspeed.ops

        # Messages through shared memory, which it would compile for a minute; gloo carries them as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    AcceleratorState.__init__ = set_up_for_cpus
    for is_end, job in itertools.groupby(sys.argv[1:], key=lambda word: word == "--"):
        if not is_end:
            AcceleratorState._reset_state()
            GradientState._reset_state()
            if status := main(["train", *job]):
                sys.exit(status)
