"""What a frozen vision tower makes of images, kept on disk, so that training need not run the tower."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torchvision
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from amvl_fast.backbones.frozen import digest, require_constant
from amvl_fast.entries import Entries
from amvl_fast.errors import AMVLError
from amvl_fast.lora import base_of
from amvl_fast.modeling import AMVLModel

# Raise it when what entries hold changes, or what is made of images on the way to the tower.
VERSION = "1"
BLOCK = 256  # rows


class VisionCache:
    """Features of images, an entry for the images of each sample, found by all that they follow from.

    That is the pixels, the image processor, and whatever of the backbone stands outside of its decoder. Models and
    processors of any number may share a directory, and any number of processes may fill it.

    Args:
        directory: created when it is filled.
        model: an `AMVLModel` or PEFT's wrapper of one, whole and not yet sharded.
        processor: the model's.
        autocast: the dtype of mixed precision that training computes in, if it does.

    Raises:
        AMVLError: the model has no latents, its tower or connector is trained, or its tower draws at random.
    """

    def __init__(
        self, directory: str | os.PathLike[str], model: Any, processor: Any, *, autocast: torch.dtype | None = None
    ) -> None:
        whole = base_of(model)
        if not isinstance(whole, AMVLModel):
            raise AMVLError(
                f"The vision cache goes with an AMVLModel, and a plain {type(whole).__name__} takes no features; "
                "leave data.vision_cache out."
            )
        require_constant(whole.adapter)
        self.entries = Entries(directory, "data.vision_cache")
        self._model: Any = whole
        self._autocast = autocast
        images = processor.image_processor
        facts = [VERSION, torch.__version__, torchvision.__version__, transformers.__version__, str(autocast)]
        facts += [type(images).__qualname__, images.to_json_string(), digest(whole.adapter)]
        self._facts = json.dumps(facts).encode()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_model": None}  # workers of a DataLoader need all but that

    def key(self, images: Sequence[Image.Image]) -> str:
        """Of the entry for a sample with these images, 64 hexadecimal digits."""
        made = hashlib.sha256(self._facts)
        for image in images:
            made.update(f"{image.mode} {image.size} {image.getpalette()}".encode())
            made.update(image.tobytes())
        return made.hexdigest()

    def read(self, key: str) -> dict[str, Tensor] | None:
        """A sample's features as `Adapter.encode_images` gives them; None if there is no such entry.

        Raises:
            AMVLError: the entry is not what was written.
        """
        return self.entries.read(key)

    @torch.no_grad()
    def fill(
        self,
        rows: Any,
        collator: Any,
        *,
        batch_size: int = 8,
        process: int = 0,
        processes: int = 1,
        workers: int = 0,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> tuple[int, int]:
        """Compute the entries of rows that are missing or damaged.

        Args:
            rows: a `ChatDataset` or a list of its rows.
            collator: a `ChatCollator` of the processor.
            batch_size: samples that the tower takes at a time.
            process, processes: which of how many share the work, each calling this.
            workers: processes that read images and look for their entries.
            device: where the tower runs; None leaves it where it is.
            progress: show a progress bar.

        Returns:
            How many entries this process computed, and how many its rows have.

        Raises:
            AMVLError: the disk is full.
        """
        # Neighbours often share an image, so rows are dealt in blocks; small ones, for nobody is to wait long.
        share = [row for row in range(len(rows)) if row // BLOCK % processes == process]
        batches: Any = DataLoader(
            Subset(rows, share),
            batch_size,
            collate_fn=Missing(self, collator),
            num_workers=workers,
            generator=torch.Generator(),  # leave PyTorch's own as it is
        )
        adapter, home = self._model.adapter, self._model.device
        device = torch.device(device or home)
        computed, seen = set(), set()
        mixed = torch.autocast(device.type, self._autocast, enabled=self._autocast is not None)
        with at_work(adapter.vision_modules, device, home), mixed:
            for keys, absent, batch in tqdm(batches, "vision cache", unit="batch", leave=False, disable=not progress):
                seen |= set(keys)
                computed |= set(absent)
                if absent:
                    tokens = (batch["input_ids"] == adapter.model.config.image_token_id).sum(1).tolist()
                    vision = {name: batch[name].to(device) for name in adapter.VISION_INPUTS if name in batch}
                    features = {name: f.split(tokens) for name, f in adapter.encode_images(**vision).items()}
                    for sample, key in enumerate(absent):
                        self.entries.write(key, {name: parts[sample] for name, parts in features.items()})
        return len(computed), len(seen)


class Missing:
    """Of rows: the keys of those with images, and of those that a cache lacks, each once, keys and prompts."""

    def __init__(self, cache: VisionCache, collator: Any) -> None:
        self.cache, self.collator = cache, collator

    def __call__(self, rows: list[dict[str, Any]]) -> tuple[list[str], list[str], dict[str, Tensor]]:
        keyed = {self.cache.key(row["images"]): row for row in rows if row.get("images")}
        absent = {key: row for key, row in keyed.items() if not self.cache.entries.is_whole(key)}
        batch = self.collator(list(absent.values()), with_answer=False) if absent else {}
        return list(keyed), list(absent), batch


class CachedCollator:
    """Batches for training that hold `image_features` out of a cache in place of pixels.

    Args:
        collator: a `ChatCollator`.
        cache: filled with the rows that will come.

    Raises:
        AMVLError: an entry is missing or damaged.
    """

    def __init__(self, collator: Any, cache: VisionCache) -> None:
        self.collator, self.cache = collator, cache

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = {name: value for name, value in self.collator(rows).items() if not name.startswith("pixel_")}
        found = [self._features(row) for row in rows if row.get("images")]
        if found:
            batch["image_features"] = {name: torch.cat([features[name] for features in found]) for name in found[0]}
        return batch

    def _features(self, row: dict[str, Any]) -> dict[str, Tensor]:
        features = self.cache.read(self.cache.key(row["images"]))
        if features is None:
            raise AMVLError(
                f"The vision cache has no entry for the images of row {row.get('row', '?')}, which have changed since "
                "it was filled; run the same command again."
            )
        return features


@contextlib.contextmanager
def at_work(modules: Sequence[nn.Module], device: torch.device, home: torch.device) -> Iterator[None]:
    """Modules on a device and in evaluation; the rest of their model may be too large for it."""
    training = [module.training for module in modules]
    try:
        for module in modules:
            module.to(device).eval()
        yield
    finally:
        for module, was_training in zip(modules, training, strict=True):
            module.to(home).train(was_training)
