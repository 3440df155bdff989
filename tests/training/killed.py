"""Trains CONFIG to its end, killed with SIGKILL on the way: ``python killed.py CONFIG SEED KILLS``; 0 kills for none.

Each life is a fork of this process, which has imported everything and computed nothing. Half of the lives end at a
moment of the clock; the other half end at an event: the end of a step, or just before or in the middle of one of the
things that writing a checkpoint is made of. Prints the events at which lives ended.
"""

import os
import random
import signal
import sys
import time

import torch

from amvl_fast.training import read_config, train
from amvl_fast.training.trainer import AMVLTrainer

LIFE = 3.0  # seconds; about what an uninterrupted run takes
EVENTS = 60  # about how many it has


def die(event):
    print(event, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


class Fate:
    """Ends the process at the given event."""

    def __init__(self, last):
        self.left = last

    def met(self):
        self.left -= 1
        return self.left == 0

    def watch(self, owner, name):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            if self.met():
                die(name)
            return real(*args, **kwargs)

        setattr(owner, name, call)

    def watch_saving(self):
        save = torch.save

        def half(value, path, *args, **kwargs):
            save(value, path, *args, **kwargs)
            if self.met():
                os.truncate(path, os.path.getsize(path) // 2)
                die("half of torch.save")

        torch.save = half


def live(path, fate):
    if fate is not None:
        for owner, name in ((os, "fsync"), (os, "replace"), (AMVLTrainer, "training_step"), (AMVLTrainer, "_save")):
            fate.watch(owner, name)
        fate.watch_saving()
    train(read_config(path))


if __name__ == "__main__":
    path, chance, kills = sys.argv[1], random.Random(int(sys.argv[2])), int(sys.argv[3])
    torch.set_num_threads(1)
    lives, status = 0, None
    while status != 0:
        lives += 1
        doomed = lives <= kills
        by_event = doomed and chance.random() < 0.5
        fate = Fate(chance.randrange(1, EVENTS)) if by_event else None
        if (child := os.fork()) == 0:
            live(path, fate)
            os._exit(0)
        if doomed and not by_event:
            time.sleep(LIFE * chance.random())
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), status
        if status == 0 and lives <= kills:
            status = None  # it was faster than its fate: the next life finds it complete
    print("lives", lives)
