"""Whether answers depend on the latents: what it costs to decode them with the latents of another row."""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm

from amvl_fast.data import ChatCollator, ChatDataset
from amvl_fast.evaluation import likelihoods, to_device
from amvl_fast.modeling import AMVLModel

SWAP_ROWS = 1000


def swap_latents(
    model: AMVLModel, collator: ChatCollator, rows: ChatDataset, *, batch_size: int, seed: int
) -> dict[str, Any]:
    """Nats per answer token under the row's own prior sample, and under that of another row.

    Latents can differ between inputs, with KLs of any size, while the decoder has learnt to ignore them; then the
    two are equal. Looks at up to 1,000 rows drawn with `seed`.

    Returns:
        `swap_rows`, and with two rows or more `swap_nll_own`, `swap_nll_other` and `swap_cost`, their difference.
    """
    rows = rows.subset(SWAP_ROWS, seed=seed)
    if len(rows) < 2:
        return {"swap_rows": 0}
    size = max(2, batch_size)
    # No batch of one, which would have nobody to swap with.
    starts = [start for start in range(0, len(rows), size) if len(rows) - start > 1]
    own = other = 0.0
    tokens = seen = 0
    for start in tqdm(starts, desc="swapping latents", unit="batch"):
        batch = [rows[i] for i in range(start, min(start + size, len(rows)))]
        inputs = to_device(collator(batch), model)
        sums = likelihoods(model, inputs, batch, seed)
        with swapped(model, len(batch)):
            swapped_sums = likelihoods(model, inputs, batch, seed)
        own += sums["nll_prior"].item()
        other += swapped_sums["nll_prior"].item()
        tokens += int(sums["tokens"])
        seen += len(batch)
    return {
        "swap_rows": seen,
        "swap_nll_own": own / tokens,
        "swap_nll_other": other / tokens,
        "swap_cost": (other - own) / tokens,
    }


def swapped(model: AMVLModel, rows: int) -> Any:
    """A context in which every row of a batch is decoded with the latents of the one half a batch away.

    Half a batch, as neighbours in a file often share their image.
    """

    def roll(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        z = args[0]
        if z.dim() != 3 or len(z) != rows:
            raise RuntimeError(f"the projection got latents of shape {tuple(z.shape)} for a batch of {rows} rows")
        return (z.roll(rows // 2, dims=0), *args[1:])

    return model.latents.projection.register_forward_pre_hook(roll)
