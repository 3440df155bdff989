"""Answers from the prior: the right tokens, in batches, repeatably."""

import pytest
import torch

import amvl_fast
from amvl_fast.errors import AMVLError
from amvl_fast.reference.three_pass import run
from amvl_fast.samples import Samples

NEW = 6


def greedy(model, batch, temperature, seed):
    """The oracle: after every token the whole sequence runs again, without any cache."""
    labels = torch.full_like(batch["input_ids"], -100)
    vision = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask", "labels")}
    mask = batch["attention_mask"]
    prompt = mask.bool()
    positions = model.adapter.positions(batch["input_ids"], mask, **vision)
    embedded = model.adapter.embed(batch["input_ids"], **vision)
    samples = Samples(*embedded, positions, prompt, torch.zeros_like(prompt), labels)
    prior = model.prior(**batch)
    noise = amvl_fast.gaussian_noise(prior.mean.shape, seed).double()
    z = prior.mean + temperature * (prior.logvar / 2).exp() * noise
    tails = [torch.cat([lead, model.latents.end]) for lead in model.latents.projection(z)]
    tokens = torch.zeros(len(tails), 0, dtype=torch.long)
    for _ in range(NEW):
        last = torch.stack([hidden[-1] for hidden in run(model.adapter, samples, tails)])
        chosen = model.adapter.head(last).argmax(-1)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        fresh = model.get_input_embeddings()(chosen)
        tails = [torch.cat([tail, row[None]]) for tail, row in zip(tails, fresh, strict=True)]
    return tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generate_equals_greedy_decoding_without_a_cache(model, collate, rows, temperature):
    batch = collate(rows, with_answer=False)
    # No early end: every row is compared over the same number of tokens.
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "eos_token_id": None, "do_sample": False}
    with torch.no_grad():
        tokens = model.generate(**batch, latent_temperature=temperature, seed=9, **options)
        expected = greedy(model, batch, temperature, 9)
    length = batch["input_ids"].shape[1]
    assert torch.equal(tokens[:, :length], batch["input_ids"])
    assert torch.equal(tokens[:, length:], expected)


def test_a_batch_of_answers_equals_answers_one_by_one(model, collate, rows):
    options = {"max_new_tokens": NEW, "do_sample": False, "latent_temperature": 0.0}
    together = model.generate(**collate(rows, with_answer=False), **options)
    for i, row in enumerate(rows):
        prompt = collate([row], with_answer=False)
        alone = model.generate(**prompt, **options)[0, prompt["input_ids"].shape[1] :]
        assert together[i, -NEW:][: len(alone)].tolist() == alone.tolist()


def test_latents_matter_to_the_answer(model, collate, rows):
    """At a wild temperature another seed gives other logits: the decoder really reads the sample."""
    batch = collate(rows, with_answer=False)
    options = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
    a, b, same = (model.generate(**batch, latent_temperature=3.0, seed=seed, **options).logits[0] for seed in (1, 2, 1))
    assert torch.equal(a, same) and not torch.allclose(a, b)


def test_return_dict_carries_the_prompt_in_its_sequences(model, collate, rows):
    batch = collate(rows, with_answer=False)
    out = model.generate(**batch, seed=1, max_new_tokens=2, return_dict_in_generate=True)
    assert torch.equal(out.sequences[:, : batch["input_ids"].shape[1]], batch["input_ids"])


def test_max_length_counts_prompt_and_new_tokens(model, collate, rows):
    batch = collate(rows, with_answer=False)
    length = batch["input_ids"].shape[1] + 5
    tokens = model.generate(**batch, seed=1, max_length=length, min_new_tokens=5, eos_token_id=None)
    assert tokens.shape == (len(rows), length)


def test_several_sequences_a_prompt(model, collate, rows):
    batch = collate(rows, with_answer=False)
    tokens = model.generate(**batch, seed=1, max_new_tokens=3, num_beams=4, num_return_sequences=2)
    assert len(tokens) == 2 * len(rows)
    assert torch.equal(tokens[::2, : batch["input_ids"].shape[1]], batch["input_ids"])


def test_a_negative_temperature_is_refused(model, collate, rows):
    with pytest.raises(AMVLError, match="temperature"):
        model.generate(**collate(rows, with_answer=False), latent_temperature=-1.0)
