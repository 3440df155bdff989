"""Chat rows to model inputs, for any Hugging Face image-text-to-text processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from amvl_fast.errors import AMVLError
from amvl_fast.samples import require_finite

# What a processor returns with one value per token, and that value on an answer; the rest is per image.
ON_ANSWER = {"attention_mask": 1, "mm_token_type_ids": 0, "token_type_ids": 0}


class ChatCollator:
    """Turn a list of :class:`ChatDataset` rows into one dictionary of tensors.

    The prompt goes through the processor exactly as it does at inference: chat template with the generation
    prompt, image tokens, tokenizer. The answer is what the template appends to that text once the chat holds
    it, tokenised by itself and appended, so that prompt ids in training are prompt ids at inference. White
    space that a template writes after its end-of-turn token (Qwen's newline) is dropped: the model never has
    to produce it. Where a template ends the turn with no special token, the tokenizer's end-of-sequence token
    is put there, for otherwise generation would never learn to stop.

    Args:
        processor: what ``AutoProcessor`` loads: callable, with ``tokenizer`` and ``apply_chat_template``.
        padding_side: where training batches are padded, ``"right"`` or ``"left"``.

    A call returns, for ``B`` rows of which the longest has ``T`` tokens:

    - ``input_ids``, ``attention_mask`` (B, T) int64
    - ``labels`` (B, T) int64: the ids of the answer up to its end of turn, -100 on prompt and padding
    - ``mm_token_type_ids`` (B, T) int64 where the processor gives it, 0 on answer and padding
    - whatever the processor gives per image, untouched: ``pixel_values``, ``image_grid_thw``, ...

    ``collator(rows, with_answer=False)`` gives the prompts alone, without ``labels`` and padded on the left,
    for ``generate``; there rows need no answer. Only tensors for the model are returned: to keep ``answer``,
    ``kind`` and ``row`` beside a batch, call the collator on a list of rows and hold on to the list.

    Raises:
        AMVLError: the chat template does not put the answer after the prompt, a row has no answer, the
            tokenizer has no padding token, or the processor refuses the rows.
    """

    def __init__(self, processor: Any, *, padding_side: str = "right") -> None:
        if padding_side not in ("left", "right"):
            raise AMVLError(f"padding_side is {padding_side!r}: use 'left' or 'right'.")
        if processor.tokenizer.pad_token_id is None:
            raise AMVLError("The tokenizer has no padding token: set `processor.tokenizer.pad_token`.")
        self.processor = processor
        self.padding_side = padding_side

    def __call__(self, rows: Sequence[dict[str, Any]], *, with_answer: bool = True) -> dict[str, torch.Tensor]:
        prompts = [self._render(_prompt(row), add_generation_prompt=True) for row in rows]
        inputs = self._process(prompts, rows)
        if not with_answer:
            return inputs
        answers = [self._answer(row, prompt) for row, prompt in zip(rows, prompts, strict=True)]
        return self._append(inputs, self._tokenize(answers))

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return self.processor.apply_chat_template(messages, tokenize=False, **options)

    def _process(self, prompts: list[str], rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [list(row.get("images") or ()) for row in rows]
        options: dict[str, Any] = {"images": images} if any(images) else {}
        begin = self.processor.tokenizer.bos_token
        if begin and prompts[0].startswith(begin):  # as in apply_chat_template: the template has written it
            options["add_special_tokens"] = False
        try:
            inputs = self.processor(text=prompts, padding=True, padding_side="left", return_tensors="pt", **options)
        except (ValueError, StopIteration) as error:  # the latter where older processors count images
            numbers = ", ".join(str(row.get("row", index)) for index, row in enumerate(rows))
            reason = str(error).rstrip(".") or type(error).__name__
            raise AMVLError(
                f"The processor refused a row among {numbers} ({reason}): check their images, and that no text holds a "
                "special token such as the image token."
            ) from error
        inputs = dict(inputs)
        # Here, on the CPU, looking is cheap; on a GPU it would stall every step.
        require_finite(**{name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)})
        return inputs

    def _answer(self, row: dict[str, Any], prompt: str) -> str:
        if len(_prompt(row)) == len(row["messages"]):
            raise AMVLError(f"Row {row.get('row', '?')} has no answer: end its messages with an assistant message.")
        full = self._render(row["messages"])
        if not full.startswith(prompt):
            raise AMVLError(
                "The processor's chat template is unusable for training, as a chat with its answer does not "
                "begin with the text of its prompt: use a template whose generation prompt is what it writes "
                "before an assistant message."
            )
        return full[len(prompt) :].rstrip()

    def _tokenize(self, answers: list[str]) -> list[torch.Tensor]:
        tokenizer = self.processor.tokenizer
        special = tokenizer.added_tokens_decoder
        ids = tokenizer(answers, add_special_tokens=False)["input_ids"]
        end = tokenizer.eos_token_id
        ended = [tokens if tokens and tokens[-1] in special else [*tokens, end] for tokens in ids]
        return [torch.tensor(tokens, dtype=torch.long) for tokens in ended]

    def _append(self, inputs: dict[str, torch.Tensor], answers: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        kept = inputs["attention_mask"].bool()

        def joined(prompts: torch.Tensor, tails: list[torch.Tensor], padding: int = 0) -> torch.Tensor:
            parts = zip(prompts, kept, tails, strict=True)
            rows = [torch.cat([prompt[mask], tail]) for prompt, mask, tail in parts]
            return pad_sequence(rows, True, padding_value=padding, padding_side=self.padding_side)

        ids = inputs["input_ids"]
        batch = inputs | {
            "input_ids": joined(ids, answers, self.processor.tokenizer.pad_token_id),
            "labels": joined(torch.full_like(ids, -100), answers, -100),
        }
        for name, value in ON_ANSWER.items():
            if name in inputs:
                batch[name] = joined(inputs[name], [torch.full_like(tail, value) for tail in answers])
        return batch


def _prompt(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row without its answer."""
    messages = row["messages"]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages
