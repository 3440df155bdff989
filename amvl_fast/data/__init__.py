"""Chat data: files, rows, batches."""

from amvl_fast.data.chat import ChatDataset
from amvl_fast.data.collator import ChatCollator
from amvl_fast.data.easy_vqa import write_easy_vqa
from amvl_fast.data.images import open_image
from amvl_fast.data.stream import ChatStream
from amvl_fast.data.worker_errors import sentence

__all__ = ["ChatCollator", "ChatDataset", "ChatStream", "open_image", "sentence", "write_easy_vqa"]
