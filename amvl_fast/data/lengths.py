"""How long rows are, roughly and without looking at them one by one."""

from __future__ import annotations

from typing import Any

import numpy as np

# Of common tokenizers on English, and of a photograph at the usual sizes: ours, and only good for sorting.
BYTES_PER_TOKEN = 4
TOKENS_PER_IMAGE = 512


def estimate(batch: Any, *, is_text: bool) -> np.ndarray:
    """Estimated tokens of each row of a ``pyarrow.Table``, int64 (rows,).

    Text counts by its bytes (UTF-8), an image by a constant; JSON text (`is_text`) with its punctuation.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    def filled(values: Any) -> np.ndarray:
        return pc.fill_null(values, 0).to_numpy(zero_copy_only=False).astype(np.int64)

    def length(array: Any) -> np.ndarray:
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        kind = array.type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            images: Any = filled(pc.equal(array, "image").cast(pa.int64()))  # the type of a part
            if is_text:
                images = sum(filled(pc.count_substring(array, f'"type":{space}"image"')) for space in ("", " "))
            return filled(pc.binary_length(array)) + BYTES_PER_TOKEN * TOKENS_PER_IMAGE * images
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            ends = np.cumsum(filled(pc.list_value_length(array)))
            sums = np.concatenate([[0], np.cumsum(length(array.flatten()))])
            return np.diff(sums[ends], prepend=0)
        if pa.types.is_struct(kind):
            return sum((length(field) for field in array.flatten()), np.zeros(len(array), np.int64))
        return np.zeros(len(array), np.int64)  # numbers, and the bytes of images

    total = np.zeros(batch.num_rows, np.int64)
    for name in {"text", "messages", "data"}.intersection(batch.column_names):
        total += np.concatenate([length(chunk) for chunk in batch.column(name).chunks])
    return total // BYTES_PER_TOKEN
