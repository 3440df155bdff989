"""The AMVL step: what each branch sees, what each gradient moves, and that batching changes nothing."""

import pytest
import torch

import amvl_fast
from amvl_fast import AMVLModel
from amvl_fast.data import ChatCollator
from amvl_fast.errors import AMVLError
from amvl_fast.modeling import POSTERIOR_STREAM, PRIOR_STREAM

from .conftest import ANSWERS, QUESTIONS, chat_row, close

PARAMETERS = ("posterior_mean", "posterior_logvar", "prior_mean", "prior_logvar")


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def moved(grads, part):
    return any(name.startswith(part) and bool(g.any()) for name, g in grads.items())


def test_the_loss_is_the_weighted_sum_of_its_terms(model, batch):
    out = model(**batch, beta=0.7, gamma=0.2, ntp_weight=0.9, prior_ntp_weight=0.4, seed=1)
    terms = 0.9 * out.ntp_loss + 0.4 * out.prior_ntp_loss + 0.7 * out.forward_kl + 0.2 * out.reverse_kl
    close(out.loss, terms)
    close(out.ntp_loss, out.nll.sum() / out.answer_tokens.sum())
    assert out.answer_tokens.tolist() == (batch["labels"] != -100).sum(-1).tolist()


def test_z_and_both_kls_are_those_of_torch_distributions(model, batch):
    from torch.distributions import Normal, kl_divergence

    out = model(**batch, seed=1)
    q = Normal(out.posterior_mean, (out.posterior_logvar / 2).exp())
    p = Normal(out.prior_mean, (out.prior_logvar / 2).exp())
    close(out.forward_kl_per_slot, kl_divergence(q, p).sum(-1))
    close(out.reverse_kl_per_slot, kl_divergence(p, q).sum(-1))
    close(out.forward_kl, kl_divergence(q, p).sum() / (3 * 3 * 5))  # "mean": over rows, slots and dimensions
    noise = amvl_fast.gaussian_noise(out.z.shape, 1, stream=POSTERIOR_STREAM, backend="torch").double()
    close(out.z, q.mean + q.stddev * noise)


def test_kl_reduction_sum_is_the_kl_of_the_whole_latent(model, batch):
    mean = model(**batch, seed=1).forward_kl
    model.config.kl_reduction = "sum"
    close(model(**batch, seed=1).forward_kl, mean * 3 * 5)


def test_the_prior_does_not_see_the_answer_and_the_posterior_does(model, collate, rows):
    before = model(**collate(rows), seed=1)
    changed = [*rows[:1], chat_row(QUESTIONS[1], "a blue triangle"), *rows[2:]]
    after = model(**collate(changed), seed=1)
    for name in ("prior_mean", "prior_logvar"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name
    for name in ("posterior_mean", "posterior_logvar"):
        assert torch.equal(getattr(before, name)[0], getattr(after, name)[0]), name
        assert not torch.allclose(getattr(before, name)[1], getattr(after, name)[1]), name


def test_generation_and_training_use_the_same_prior(model, collate, rows):
    prior = model.prior(**collate(rows, with_answer=False))
    out = model(**collate(rows), seed=1)
    close(prior.mean, out.prior_mean)
    close(prior.logvar, out.prior_logvar)


def test_the_decoder_reads_z_the_prompt_and_earlier_answer_tokens(model, collate, rows):
    first, second = (model(**collate(rows), seed=seed) for seed in (1, 2))
    assert not torch.allclose(first.nll, second.nll)  # another sample, another likelihood
    other_prompt = model(**collate([chat_row(QUESTIONS[2], ANSWERS[1])]), seed=1)
    assert not torch.allclose(other_prompt.nll, model(**collate([rows[1]]), seed=1).nll)


def test_the_nll_is_that_of_the_unmodified_backbone_on_the_same_embeddings(model, collate, rows):
    """An independent route: one row, its embeddings put together here, logits from the backbone's own forward."""
    batch = collate([rows[0]])
    out = model(**batch, seed=4)
    labels = batch["labels"][0]
    prompt = int((labels == -100).sum())
    backbone, latents = model.backbone, model.latents
    vision = {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
    embeds = backbone.model.get_input_embeddings()(batch["input_ids"])
    features = torch.cat(list(backbone.get_image_features(*vision.values(), return_dict=True).pooler_output))
    embeds[batch["input_ids"] == backbone.config.image_token_id] = features.to(embeds.dtype)
    lead = torch.cat([latents.projection(out.z), latents.end[None]], dim=1)
    full = torch.cat([embeds[:, :prompt], lead, embeds[:, prompt:]], dim=1)
    # Positions: M-RoPE on the prompt, then one text position a row.
    positions, _ = backbone.model.get_rope_index(
        batch["input_ids"], batch["mm_token_type_ids"], image_grid_thw=batch["image_grid_thw"]
    )
    start = positions[:, :, :prompt].max() + 1
    after = torch.arange(start, start + full.shape[1] - prompt).expand(3, 1, -1)
    logits = backbone(inputs_embeds=full, position_ids=torch.cat([positions[:, :, :prompt], after], dim=-1)).logits[0]
    predicting = logits[prompt + lead.shape[1] - 1 : -1]
    nll = torch.nn.functional.cross_entropy(predicting, labels[prompt:], reduction="sum")
    close(out.nll[0], nll, 1e-10)


def test_each_kl_moves_one_side_only(model, batch):
    out = model(**batch, seed=1)
    forward = gradients(model, model(**batch, seed=1).forward_kl)
    reverse = gradients(model, model(**batch, seed=1).reverse_kl)
    assert moved(forward, "latents.prior_head") and not moved(forward, "latents.posterior_head")
    assert moved(reverse, "latents.posterior_head") and not moved(reverse, "latents.prior_head")
    assert moved(forward, "backbone.model.language_model") and moved(reverse, "backbone.model.language_model")
    plain = gradients(model, model(**batch, seed=1, stop_gradient=False).forward_kl)
    assert moved(plain, "latents.prior_head") and moved(plain, "latents.posterior_head")
    assert out.forward_kl > 0 and out.reverse_kl > 0


def test_the_answers_loss_trains_the_side_that_was_sampled(model, batch):
    posterior = gradients(model, model(**batch, seed=1).ntp_loss)
    assert moved(posterior, "latents.posterior_head") and not moved(posterior, "latents.prior_head")
    prior = gradients(model, model(**batch, seed=1, prior_ntp_weight=1.0).prior_ntp_loss)
    assert moved(prior, "latents.prior_head") and not moved(prior, "latents.posterior_head")
    for part in ("latents.slots", "latents.end", "latents.projection", "backbone.model.language_model"):
        assert moved(posterior, part), part


def test_the_vision_tower_is_frozen_unless_asked(model, base, batch):
    assert not moved(gradients(model, model(**batch, seed=1).loss), "backbone.model.visual")
    free = AMVLModel.from_backbone(str(base), model.config, freeze_vision=False)
    assert moved(gradients(free, free(**batch, seed=1).loss), "backbone.model.visual")


def test_posterior_and_prior_samples_draw_different_noise(model, batch):
    out = model(**batch, seed=1)
    shape = out.z.shape
    streams = [amvl_fast.gaussian_noise(shape, 1, stream=s) for s in (POSTERIOR_STREAM, PRIOR_STREAM)]
    assert not torch.allclose(*streams)


def test_a_batch_equals_its_rows_one_by_one(model, collate, rows):
    together = model(**collate(rows), seed=1)
    for i, row in enumerate(rows):
        alone = model(**collate([row]), seed=1)
        for name in (*PARAMETERS, "forward_kl_per_slot", "reverse_kl_per_slot"):
            close(getattr(together, name)[i], getattr(alone, name)[0])
    # Noise belongs to a row's place in the batch, so likelihoods are compared at the first place.
    for i in range(len(rows)):
        turned = model(**collate(rows[i:] + rows[:i]), seed=1, prior_ntp_weight=1.0)
        alone = model(**collate([rows[i]]), seed=1, prior_ntp_weight=1.0)
        close(turned.nll[0], alone.nll[0])
        close(turned.prior_nll[0], alone.prior_nll[0], 1e-10)


def test_left_padding_equals_right_padding(model, processor, rows):
    left, right = (ChatCollator(processor, padding_side=side)(rows) for side in ("left", "right"))
    assert not torch.equal(left["input_ids"], right["input_ids"])
    a, b = (model(**padded, seed=1, prior_ntp_weight=1.0) for padded in (left, right))
    for name in (*PARAMETERS, "z", "nll", "prior_nll", "forward_kl_per_slot", "loss"):
        close(getattr(a, name), getattr(b, name))
    ga, gb = gradients(model, a.loss), gradients(model, b.loss)
    assert ga.keys() == gb.keys()
    for name in ga:
        close(ga[name], gb[name], 1e-10)


def test_eager_attention_equals_sdpa(model, base, batch):
    eager = AMVLModel.from_backbone(str(base), model.config, dtype=torch.float64, attn_implementation="eager")
    eager.load_state_dict(model.state_dict())
    assert eager.backbone.model.language_model.config._attn_implementation == "eager"
    # transformers' eager attention takes its softmax in float32, whatever the dtype.
    close(eager(**batch, seed=1).loss, model(**batch, seed=1).loss, 1e-6)


def test_activation_checkpointing_changes_nothing(model, batch):
    off = gradients(model, model(**batch, seed=1).loss)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    on = gradients(model, model(**batch, seed=1).loss)
    assert off.keys() == on.keys()
    for name in off:
        close(on[name], off[name], 1e-10)


def test_text_after_the_answer_changes_nothing(model, batch):
    """A template's closing newline is attended to but not labelled: it is neither prompt nor answer."""
    tail = torch.ones(3, 1, dtype=torch.long)
    right = model(**batch, seed=1)
    longer = {
        name: torch.cat([value, {"input_ids": 7, "labels": -100}.get(name, 0) * tail], dim=1)
        for name, value in batch.items()
        if value.dim() == 2 and value.shape[0] == 3 and name not in ("image_grid_thw", "pixel_values")
    }
    longer["attention_mask"][:, -1] = 1
    vision = {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
    close(model(**longer, **vision, seed=1).loss, right.loss)


def test_a_bfloat16_model_measures_its_kls_in_float32(model, base, batch):
    """Both sides see the same bfloat16 hidden states; what is left is the error of the heads and the KL alone."""
    half = AMVLModel.from_backbone(str(base), model.config, dtype=torch.bfloat16).eval()
    half.load_state_dict(model.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = half(**batch, seed=1)
    assert {getattr(out, name).dtype for name in (*PARAMETERS, "z", "forward_kl", "loss")} == {torch.float32}
    assert out.posterior_logvar.unique().numel() > out.posterior_logvar.bfloat16().unique().numel()
    assert torch.isfinite(out.loss) and abs(out.loss - model(**batch, seed=1).loss) < 0.2


def test_the_same_seed_gives_the_same_loss_and_torchs_generator_rules_without_one(model, batch):
    assert torch.equal(model(**batch, seed=5).loss, model(**batch, seed=5).loss)
    assert not torch.equal(model(**batch, seed=5).z, model(**batch, seed=6).z)
    torch.manual_seed(3)
    first, second = model(**batch).z, model(**batch).z
    torch.manual_seed(3)
    assert torch.equal(model(**batch).z, first) and not torch.equal(first, second)


def mislabelled(batch, change):
    labels = batch["labels"].clone()
    change(labels)
    return {**batch, "labels": labels}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda labels: labels[1].fill_(-100), "Row 1 of the batch has no answer"),
        (lambda labels: labels[2].fill_(3), "Row 2 of the batch has no prompt"),
        (lambda labels: labels[0, 2:3].fill_(3), "Row 0 of the batch has labels in several pieces"),
    ],
)
def test_labels_that_are_no_answer_are_refused(model, batch, change, words):
    with pytest.raises(AMVLError, match=words):
        model(**mislabelled(batch, change), seed=1)


def test_labels_on_padding_are_refused(model, batch):
    batch["attention_mask"][:, -3:] = 0
    with pytest.raises(AMVLError, match="labels on padding"):
        model(**batch, seed=1)


def test_nan_images_are_refused_by_the_collator(processor, rows, monkeypatch):
    monkeypatch.setattr(processor.image_processor, "image_std", [0.0, 0.0, 0.0])
    with pytest.raises(AMVLError, match="pixel_values holds NaN"):
        ChatCollator(processor)(rows)


def test_other_bad_calls_are_refused(model, batch):
    with pytest.raises(AMVLError, match="pixel_values holds NaN"):
        model(
            **{
                **batch,
                "pixel_values": batch["pixel_values"].clone().index_fill_(0, torch.tensor([3]), torch.nan),
            }
        )
    without = {name: value for name, value in batch.items() if name not in ("pixel_values", "image_grid_thw")}
    with pytest.raises(AMVLError, match="pixel_values are missing"):
        model(**without)
    with pytest.raises(AMVLError, match="pixel_values and image_grid_thw go together"):
        model(**without, pixel_values=batch["pixel_values"])
    with pytest.raises(AMVLError, match=r"does not take the inputs \['pixel_values_videos'\]"):
        model.generate(batch["input_ids"], pixel_values_videos=torch.zeros(1))
    with pytest.raises(AMVLError, match="execution='two_pass' is not known"):
        model(**batch, execution="two_pass")
    with pytest.raises(AMVLError, match="needs labels"):
        model(batch["input_ids"])
    with pytest.raises(AMVLError, match=r"does not take the inputs \['pixel_values_videos'\]"):
        model(**batch, pixel_values_videos=torch.zeros(1))
