"""Chat data: files, rows, batches."""

from amvl_fast.data.chat import ChatDataset, open_image
from amvl_fast.data.collator import ChatCollator
from amvl_fast.data.easy_vqa import write_easy_vqa

__all__ = ["ChatCollator", "ChatDataset", "open_image", "write_easy_vqa"]
