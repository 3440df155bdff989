"""Fills a vision cache: ``vision_cache_process.py INPUTS DIRECTORY N``; killed before entry N, from 1, is in place."""

import os
import signal
import sys
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from amvl_fast import AMVLModel
from amvl_fast.data import ChatCollator, ChatDataset
from amvl_fast.vision_cache import VisionCache

if __name__ == "__main__":
    inputs, directory, deadly_entry = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    synced = []

    def fsync(number, sync=os.fsync):
        synced.append(sync(number))
        if len(synced) == deadly_entry:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = fsync
    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(inputs / "base")
    model = AMVLModel.from_backbone(AutoModelForImageTextToText.from_pretrained(inputs / "base"))
    VisionCache(directory, model, processor).fill(ChatDataset(inputs / "train.jsonl"), ChatCollator(processor))
