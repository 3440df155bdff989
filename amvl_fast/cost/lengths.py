"""Lengths of a data file's rows, as a run would tokenise them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from amvl_fast.cost.flops import Sample
from amvl_fast.errors import AMVLError

if TYPE_CHECKING:
    from amvl_fast.training.config import RunConfig


@dataclass(frozen=True)
class Lengths:
    """`mean` and `longest` lengths of `looked_at` of a file's `rows`."""

    mean: Sample
    longest: Sample
    rows: int
    looked_at: int


def read_lengths(config: RunConfig, limit: int = 200) -> Lengths:
    """Tokenise up to `limit` rows of the training file, drawn at random, one by one.

    Raises:
        AMVLError: the file or the processor is not there, or a row is bad.
    """
    # Here, because training itself imports what a step costs.
    from amvl_fast.data import ChatCollator, ChatDataset
    from amvl_fast.data.sources import find_sources
    from amvl_fast.training.loading import load_processor

    data = config.data
    try:
        sources = find_sources(data.train, data.train_split)
        if data.streaming or any(source.kind == "hub" for source in sources):
            raise AMVLError("it would have to be downloaded or converted for this")
    except AMVLError as error:
        reason = str(error).rstrip(".")
        raise AMVLError(
            f"data.train: no lengths can be read from {data.train} ({reason}); give --prompt-tokens, --answer-tokens "
            "and --image-tokens."
        ) from None
    rows = ChatDataset(data.train, **data.reading)
    some = rows.subset(limit)
    collate = ChatCollator(load_processor(config))
    image = image_token(config)
    seen = []
    for i in range(len(some)):
        row = some[i]
        batch = collate([row])
        answer = int((batch["labels"] != -100).sum())
        tokens = int((batch["input_ids"] == image).sum())
        seen.append((int(batch["attention_mask"].sum()) - answer, answer, tokens, len(row["images"])))
    prompt, answer, tokens, images = (sum(column) / len(seen) for column in zip(*seen, strict=True))
    longest = max(seen, key=lambda lengths: lengths[0] + 2 * lengths[1])
    return Lengths(
        Sample(prompt, answer, tokens, max(images, 1)),
        Sample(*longest[:3], max(longest[3], 1)),
        rows=len(rows),
        looked_at=len(seen),
    )


def image_token(config: RunConfig) -> int:
    """The id that stands for a piece of an image."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(config.model.backbone, **config.model.hub).image_token_id
