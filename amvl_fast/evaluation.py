"""Accuracy and likelihood of a model on chat rows, with and without latents, and whether its latents carry anything."""

from __future__ import annotations

import math
import string
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from amvl_fast.data import ChatCollator
from amvl_fast.data.rows import text_of
from amvl_fast.lora import base_of
from amvl_fast.modeling import AMVLModel

ACTIVE_VARIANCE = 0.01

# Said in full, because checkpoints bring defaults of their own, and a penalty means something else with latents: they
# enter as embeddings, so the prompt's tokens are not penalised.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "temperature": None,
    "top_p": None,
    "top_k": None,
}


class Evaluation(NamedTuple):
    """What `evaluate` found.

    Attributes:
        metrics: accuracies and nats per answer token; for a model with latents also both KLs per slot, in nats, and
            active units per slot. Every value is a float, an int, or a list or dict of them.
        predictions: one dict a row: `row`, `kind`, `question`, `answer`, `prediction`, `correct`.
    """

    metrics: dict[str, Any]
    predictions: list[dict[str, Any]]


def evaluate(
    model: PreTrainedModel,
    collator: ChatCollator,
    rows: Sequence[dict[str, Any]],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 16,
    latent_temperature: float | None = None,
    seed: int = 0,
    progress: bool = False,
    process: int = 0,
    processes: int = 1,
) -> Evaluation:
    """Answer every row greedily, from the *prior* where the model has latents, and score its right answer.

    Args:
        model: an `AMVLModel`, or any image-text-to-text model.
        collator: of the model's processor.
        rows: a `ChatDataset` or a list of its rows.
        latent_temperature: for the answers; None takes the model's. Likelihoods are taken at temperature 1.
        seed: of the latents' noise, which belongs to rows, so that an evaluation changes no random state and repeats
            exactly, whatever the batch size.
        progress: show a progress bar.
        process, processes: which of how many share the work; each gets the whole result.

    The answer counts as right if it equals the row's after lower-casing and stripping space and punctuation.
    """
    was_training = model.training
    model.eval()
    predictions: list[dict[str, Any]] = []
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    starts = range(0, len(rows), batch_size)
    turns = math.ceil(len(starts) / processes)
    for turn in tqdm(range(turns), desc="evaluating", unit="batch", disable=not progress):
        number = turn * processes + process
        # Models that are sharded over processes run in step: who has nothing left runs the first batch again.
        start = starts[number] if number < len(starts) else 0
        batch = [{"row": i, **rows[i]} for i in range(start, min(start + batch_size, len(rows)))]
        options: dict[str, Any] = {"latent_temperature": latent_temperature, "max_new_tokens": max_new_tokens}
        texts = answer(model, collator, batch, seed=seed, **options)
        found = likelihoods(model, to_device(collator(batch), model), batch, seed)
        if number < len(starts):
            predictions += [prediction(row, text) for row, text in zip(batch, texts, strict=True)]
            for name, value in found.items():
                sums[name] = sums[name] + value.double().cpu()
    model.train(was_training)
    if processes > 1:
        predictions, sums = _gather(predictions, sums)
    return Evaluation({**accuracies(predictions), **summarise(sums)}, predictions)


def _gather(predictions: list[dict[str, Any]], sums: dict[str, Tensor]) -> tuple[list[dict[str, Any]], Any]:
    """What all processes found, in the order of the rows."""
    from accelerate.utils import gather_object  # a package for training

    every = gather_object([(predictions, dict(sums))])
    total = {name: sum(s[name] for _, s in every if name in s) for name in {n for _, s in every for n in s}}
    return sorted((p for found, _ in every for p in found), key=lambda p: p["row"]), total


def sample_ids(rows: Sequence[dict[str, Any]], model: PreTrainedModel) -> Tensor:
    """The rows' numbers, to which noise belongs."""
    return torch.tensor([row["row"] for row in rows], device=model.device)


def to_device(batch: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.to(model.device) for name, value in batch.items()}


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    collator: ChatCollator,
    rows: Sequence[dict[str, Any]],
    *,
    latent_temperature: float | None = None,
    seed: int | None = None,
    **generate_kwargs: Any,
) -> list[str]:
    """The model's answers as text; greedy unless `generate_kwargs` say otherwise."""
    inputs = to_device(collator(rows, with_answer=False), model)
    if isinstance(base_of(model), AMVLModel):
        generate_kwargs |= {"latent_temperature": latent_temperature, "seed": seed}
        if all("row" in row for row in rows):
            generate_kwargs["sample_ids"] = sample_ids(rows, model)
    generate: Any = model.generate  # transformers mixes it in under a type that mypy cannot call
    tokens = generate(**inputs, **{**GREEDY, **generate_kwargs})
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in collator.processor.tokenizer.batch_decode(new, skip_special_tokens=True)]


@torch.no_grad()
def likelihoods(
    model: PreTrainedModel, batch: dict[str, Tensor], rows: Sequence[dict[str, Any]], seed: int
) -> dict[str, Tensor]:
    """Sums over a batch, made of `rows`, of what `summarise` averages over all of them."""
    if not isinstance(base_of(model), AMVLModel):
        tokens = (batch["labels"] != -100).sum()
        return {"tokens": tokens, "nll": model(**batch).loss * tokens}
    out = model(**batch, prior_ntp_weight=1.0, seed=seed, sample_ids=sample_ids(rows, model))
    sums = {"rows": torch.tensor(len(out.z)), "tokens": out.answer_tokens.sum()}
    sums |= {"nll_posterior": out.nll.sum(), "nll_prior": out.prior_nll.sum()}
    sums |= {"forward_kl": out.forward_kl_per_slot.sum(0), "reverse_kl": out.reverse_kl_per_slot.sum(0)}
    for side, mean in (("posterior", out.posterior_mean.double()), ("prior", out.prior_mean.double())):
        sums |= {f"{side}_mean": mean.sum(0), f"{side}_square": mean.square().sum(0)}
    return sums


def summarise(sums: dict[str, Tensor]) -> dict[str, Any]:
    """Averages of the sums of `likelihoods`.

    A latent dimension is active if the variance over rows of its mean exceeds 0.01, Var_x(E[z | x]) > 0.01
    (Burda et al. 2016, arXiv 1509.00519).
    """
    tokens = sums["tokens"]
    if "nll" in sums:
        return {"nll": (sums["nll"] / tokens).item()}
    rows = sums["rows"]
    metrics: dict[str, Any] = {
        "nll_posterior": (sums["nll_posterior"] / tokens).item(),
        "nll_prior": (sums["nll_prior"] / tokens).item(),
        "forward_kl_per_slot": (sums["forward_kl"] / rows).tolist(),
        "reverse_kl_per_slot": (sums["reverse_kl"] / rows).tolist(),
    }
    for side in ("posterior", "prior"):
        variance = sums[f"{side}_square"] / rows - (sums[f"{side}_mean"] / rows).square()
        metrics[f"active_units_{side}"] = (variance > ACTIVE_VARIANCE).sum(-1).tolist()
    metrics["leakage"] = metrics["nll_prior"] - metrics["nll_posterior"]
    return metrics


def normalise(text: str) -> str:
    return text.lower().strip(string.whitespace + string.punctuation)


def prediction(row: dict[str, Any], text: str) -> dict[str, Any]:
    return {
        "row": row["row"],
        "kind": str(row.get("kind") or "all"),
        "question": next(text_of(m) for m in reversed(row["messages"]) if m["role"] == "user"),
        "answer": row["answer"],
        "prediction": text,
        "correct": normalise(text) == normalise(row["answer"]),
    }


def accuracies(predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    kinds: dict[str, list[bool]] = defaultdict(list)
    for p in predictions:
        kinds[p["kind"]].append(p["correct"])
    return {
        "rows": len(predictions),
        "accuracy": sum(p["correct"] for p in predictions) / len(predictions),
        "accuracy_by_kind": {kind: sum(hits) / len(hits) for kind, hits in sorted(kinds.items())},
    }
