"""Run prompts once, and any number of branches against their keys and values, with gradients.

    x -> keys and values, with their graph
         |- branch 0
         |- branch 1 ...

A decoder is causal, so what the rows of a prompt compute does not depend on what follows them. Branches that share a
prompt therefore share its keys and values, and the gradients that reach them through all branches add up to those of
running the prompt again for each: exact, not approximate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from amvl_fast.backbones import Adapter, adapter_for
from amvl_fast.errors import AMVLError
from amvl_fast.prefix.attention import Attention, is_flash, take_prefix
from amvl_fast.prefix.requirements import require_fixed_rotations, require_shareable, window_of
from amvl_fast.prefix.rows import BranchRows, Prompts, lay_out


class Branch(NamedTuple):
    """What follows each prompt of a batch.

    Attributes:
        embeds: ``(batch, rows, hidden_size)``.
        mask: ``(batch, rows)`` bool, False on padding, which may be anywhere and is read by nobody; None for none.
    """

    embeds: Tensor
    mask: Tensor | None = None


class Prefix:
    """Prompts that ran, for branches to continue; made by `Prefix.of`.

    Attributes:
        prompts: where they lie.
        keys, values: for each layer, by its index, ``(batch, heads, rows, head_dim)``, or ``(1, heads, all rows,
            head_dim)`` if packed; after rotary embedding, and with their graph.
    """

    def __init__(self, adapter: Adapter, prompts: Prompts, next_position: Tensor) -> None:
        self.adapter = adapter
        self.prompts = prompts
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        # Rows after a prompt take the text positions that follow its largest, whatever the rotary scheme.
        self._next_position = next_position

    @classmethod
    def of(
        cls,
        adapter: Adapter,
        embeds: Tensor,
        positions: Tensor,
        mask: Tensor,
        extras: dict[str, Tensor] | None = None,
        *,
        padding_free: bool = False,
    ) -> Prefix:
        """Run prompts.

        Args:
            adapter: of the backbone, see `amvl_fast.backbones`.
            embeds: ``(batch, length, hidden_size)``, images in place.
            positions: ``(axes, batch, length)``, rotary positions.
            mask: ``(batch, length)`` bool, True on the prompt's rows; the others, anywhere, are left out.
            extras: what else the adapter's `decode` takes for each row, ``(batch, length, ...)``.
            padding_free: run prompts one behind the other in one row; for flash attention.

        Raises:
            AMVLError: the backbone's attention cannot share prompts, or checkpointing would drop their gradients.
        """
        require_shareable(adapter.decoder)
        name = take_prefix(adapter.decoder)
        if padding_free and not is_flash(name):
            raise AMVLError(
                f"padding_free needs a flash attention, and attn_implementation is {name!r}; use one, or leave "
                "padding_free out."
            )
        prompts, index = lay_out(mask, packed=padding_free)
        after = positions.masked_fill(~mask, 0).amax((0, 2)) + 1
        self = cls(adapter, prompts, after)
        record = _Record(self)
        try:
            hidden = adapter.decode(
                embeds.flatten(0, 1)[index],
                None,
                positions.flatten(1)[:, index],
                extras={name: value.flatten(0, 1)[index] for name, value in (extras or {}).items()},
                prefix=record,
                **prompts.sequences(),
            )
        finally:
            # The graph keeps the record where layers are checkpointed; were it to keep the prefix, which keeps the
            # graph, a step without a backward pass would never be freed.
            record.prefix = None
        missing = adapter.layers - len(self.keys)
        if missing:
            raise AMVLError(
                f"shared_prefix: {missing} of {adapter.layers} layers of {type(adapter.decoder).__name__} do not call "
                "transformers' AttentionInterface with keys and values; use execution='three_pass'."
            )
        if is_sharded(adapter.decoder):
            last = max(self.keys)
            self.keys[last], self.values[last] = _Joined.apply(self.keys[last], self.values[last], hidden)
        return self

    def run(self, branches: Sequence[Branch]) -> list[Tensor]:
        """Final hidden states ``(batch, rows, hidden_size)`` of each branch; those on padding mean nothing.

        All branches run in one call, side by side, each blind to the others.
        """
        masks = [
            embeds.new_ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask for embeds, mask in branches
        ]
        rows = BranchRows(masks, self.prompts)
        longest = self.prompts.longest + max(mask.shape[1] for mask in masks)
        require_fixed_rotations(self.adapter.decoder, longest)
        embeds = torch.cat([branch.embeds for branch in branches], dim=1)
        positions = self._next_position[:, None] + rows.order.clamp(min=0)
        name = str(self.adapter.decoder.config._attn_implementation)
        read = _ReadPacked if is_flash(name) else _ReadBlocks if name == "flex_attention" else _Read
        hidden = read(self, rows).decode(embeds, positions)
        return list(hidden.split([mask.shape[1] for mask in masks], dim=1))


def is_sharded(decoder: nn.Module) -> bool:
    """Whether an engine (FSDP, DeepSpeed's ZeRO-3) gathers the weights of each layer when it runs."""
    gathered = any(isinstance(module, FSDPModule) for module in decoder.modules())
    return gathered or any(hasattr(parameter, "ds_id") for parameter in decoder.parameters())


class _Joined(torch.autograd.Function):
    """Keys and values as they are, and for the prompts' final hidden states a gradient of zeros.

    Engines that shard gather a layer's weights again when the gradient of its output arrives. Nobody reads the output
    of the prompts' last layer, so its keys and values would go backward through weights that are not there.
    """

    @staticmethod
    def forward(ctx: Any, keys: Tensor, values: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        ctx.hidden = hidden.shape, hidden.dtype, hidden.device
        return keys.view_as(keys), values.view_as(values)

    @staticmethod
    def backward(ctx: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape, dtype, device = ctx.hidden
        return keys, values, torch.zeros(shape, dtype=dtype, device=device)


def run_prompts(
    backbone: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    padding_free: bool = False,
    **vision: Any,
) -> Prefix:
    """Run prompts once, for branches to continue: the piece of `AMVLModel` for training loops of your own.

    Args:
        backbone: an image-text-to-text model of transformers, of a family in `amvl_fast.backbones.ADAPTERS`. If its
            attention is ``"eager"``, it goes by the name ``"amvl_fast_eager"`` from now on.
        input_ids: ``(batch, length)`` int64, prompts alone, padded on either side.
        attention_mask: ``(batch, length)``, 0 on padding; None means no padding.
        padding_free: see `Prefix.of`.
        vision: what the processor gives for images (`pixel_values`, `image_grid_thw`, ...).

    Raises:
        AMVLError: the architecture is not supported, or see `Prefix.of`.

    Example::

        prefix = amvl_fast.run_prompts(backbone, **processor(images=images, text=prompts, return_tensors="pt"))
        embed, head = backbone.get_input_embeddings(), backbone.get_output_embeddings()
        short, long = prefix.run([Branch(embed(some_ids)), Branch(embed(other_ids))])
        loss = cross_entropy(head(short[:, :-1]).flatten(0, 1), some_ids[:, 1:].flatten()) + ...
    """
    adapter = adapter_for(backbone)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    embeds, extras = adapter.embed(input_ids, **vision)
    return Prefix.of(
        adapter, embeds, adapter.positions(input_ids, mask, **vision), mask.bool(), extras, padding_free=padding_free
    )


# What is kept in Python stays out of compiled layers: as guards, it would have each compiled for itself.
_outside_of_graphs: Any = torch.compiler.disable


class _Record:
    """Attention of prompts: as it is, and keys and values are kept, the first time."""

    def __init__(self, prefix: Prefix) -> None:
        self.prefix: Prefix | None = prefix
        self.trains = torch.is_grad_enabled()

    def attend(
        self, attention: Attention, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        self.put(module, key, value, kwargs.get("sliding_window"))
        return attention(module, query, key, value, mask, **kwargs)

    @_outside_of_graphs
    def put(self, module: Any, key: Tensor, value: Tensor, window: int | None) -> None:
        if self.prefix is None:  # a checkpointed layer comes by again in the backward pass
            return
        if self.trains and not torch.is_grad_enabled():
            raise AMVLError(
                "shared_prefix cannot keep the gradients of prompts under reentrant activation checkpointing; call "
                "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})."
            )
        window_of(module, {"sliding_window": window})
        self.prefix.keys[module.layer_idx], self.prefix.values[module.layer_idx] = key, value


class _Read:
    """Attention of branches: over their prompt's keys and their own, with a mask for all of it."""

    def __init__(self, prefix: Prefix, rows: BranchRows) -> None:
        self.prefix, self.rows = prefix, rows
        # Layers of one kind share theirs.
        self.masks: dict[Any, Any] = {}

    def decode(self, embeds: Tensor, positions: Tensor) -> Tensor:
        axes = self.prefix.adapter.AXES
        return self.prefix.adapter.decode(embeds, None, positions.expand(axes, -1, -1), prefix=self)

    def attend(
        self, attention: Attention, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        key, value, mask = self.extend(module, query, key, value, kwargs.get("sliding_window"))
        return attention(module, query, key, value, mask, **kwargs)

    @_outside_of_graphs
    def extend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, window: int | None
    ) -> tuple[Tensor, Tensor, Any]:
        kind = window, query.dtype, query.device
        if kind not in self.masks:
            self.masks[kind] = self.mask(*kind)
        key = torch.cat([self.prefix.keys[module.layer_idx], key], dim=2)
        return key, torch.cat([self.prefix.values[module.layer_idx], value], dim=2), self.masks[kind]

    def mask(self, window: int | None, dtype: torch.dtype, device: torch.device) -> Any:
        return self.rows.mask(window, dtype).to(device)


class _ReadBlocks(_Read):
    """The same for flex attention."""

    def mask(self, window: int | None, dtype: torch.dtype, device: torch.device) -> Any:
        return self.rows.block_mask(window).to(str(device))


class _ReadPacked(_Read):
    """Attention of branches over sequences of several lengths, each a prompt's keys and a branch's own: no mask."""

    def decode(self, embeds: Tensor, positions: Tensor) -> Tensor:
        rows = self.rows.packed.rows
        hidden = super().decode(embeds.flatten(0, 1)[rows][None], positions.flatten()[rows][None])
        spread = hidden.new_zeros(embeds.shape[0] * embeds.shape[1], hidden.shape[-1])
        return spread.index_copy(0, rows, hidden[0]).view(embeds.shape)

    def attend(
        self, attention: Attention, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        key, value, sequences = self.extend(module, query, key, value, None)
        return attention(module, query, key, value, None, **kwargs | sequences)

    @_outside_of_graphs
    def extend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, window: int | None
    ) -> tuple[Tensor, Tensor, Any]:
        packed, layer = self.rows.packed, module.layer_idx
        index = packed.keys.to(key.device)
        sequences = {n: v.to(key.device) if isinstance(v, Tensor) else v for n, v in packed.lengths.items()}
        return (
            _select(self.prefix.keys[layer], key, index),
            _select(self.prefix.values[layer], value, index),
            sequences,
        )


def _select(of_prompts: Tensor, own: Tensor, index: Tensor) -> Tensor:
    """Rows of two ``(batch, heads, rows, head_dim)``, flattened, one behind the other: ``(1, heads, n, head_dim)``."""
    rows = torch.cat([of_prompts.transpose(1, 2).flatten(0, 1), own.transpose(1, 2).flatten(0, 1)])
    return rows[index].transpose(0, 1)[None]
