"""One prefix, three branches: the same loss, outputs and gradients as three passes over the prompt."""

import shutil
from contextlib import nullcontext

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers.integrations import flex_attention as flex

import amvl_fast
from amvl_fast.errors import AMVLError

from .families import CONFIGS, IMAGE, IMAGES, make_batch, make_model
from .flash import use_attention, use_flash
from .precision import Float64Throughout

FAMILIES = list(CONFIGS)
compiles = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler for torch.compile"
)
OUTPUTS = ("loss", "ntp_loss", "forward_kl", "reverse_kl", "z", "posterior_mean", "prior_mean", "nll")


@pytest.fixture(autouse=True)
def noise_in_float64(monkeypatch):
    """The kernels' noise is float32, which no cast makes more precise."""
    monkeypatch.setenv("AMVL_FAST_BACKEND", "torch")


def step(model, batch, execution, seed=5, throughout=True, **options):
    """Outputs and gradients of a step, by name."""
    model.zero_grad()
    with Float64Throughout() if throughout and model.dtype == torch.float64 else nullcontext():
        out = model(**batch, seed=seed, beta=0.7, gamma=0.4, execution=execution, **options)
        out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: out[name].detach() for name in OUTPUTS} | grads


def assert_same(actual, expected, tolerance):
    """Relative in norm: of each output, and of each gradient with a floor of all gradients' root mean square."""
    assert actual.keys() == expected.keys()
    grads = [value for name, value in expected.items() if name not in OUTPUTS]
    typical = (sum(g.double().square().sum() for g in grads) / sum(g.numel() for g in grads)).sqrt()
    for name, value in expected.items():
        floor = 0.0 if name in OUTPUTS else typical * value.numel() ** 0.5
        error = (actual[name].double() - value.double()).norm()
        assert error <= tolerance * max(value.double().norm(), floor), f"{name}: {error / value.double().norm():.1e}"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_on_every_family(family, attention, side):
    model = make_model(family)
    model.backbone.set_attn_implementation(attention)
    batch = make_batch(model, family, side=side)
    expected = step(model, batch, "three_pass")
    assert_same(step(model, batch, "shared_prefix"), expected, 1e-10)


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_with_flash_attention(monkeypatch, family, padding_free):
    """transformers' own FlashAttention-2 code, over a stand-in of the package, beside SDPA."""
    model = make_model(family)
    images = (0, 0, 0) if family == "gemma3" else (2, 1, 0)  # whose image tokens flash attention cannot mask
    batch = make_batch(model, family, images=images)
    expected = step(model, batch, "three_pass")
    stand_in = use_flash(monkeypatch, model)
    assert_same(step(model, batch, "shared_prefix", padding_free=padding_free), expected, 1e-10)
    layers = model.adapter.layers
    prompts = "varlen" if padding_free else "dense"
    expected_calls = {"dense": 0, "varlen": 2 * layers}
    expected_calls[prompts] += layers
    assert stand_in.calls == expected_calls


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
def test_sliding_windows(monkeypatch, family, attention):
    """Windows shorter than a prompt, than an answer, and than both together."""
    for window in (2, 5, 12):
        model = make_model(family, sliding_window=window, layer_types=["sliding_attention", "full_attention"])
        for layer, kind in zip(model.adapter.decoder.layers, ("sliding", "full"), strict=True):
            assert (layer.self_attn.sliding_window is not None) == (kind == "sliding")
        batch = make_batch(model, family, images=(0, 0, 0))
        expected = step(model, batch, "three_pass")
        use_attention(monkeypatch, model, attention)
        assert_same(step(model, batch, "shared_prefix"), expected, 1e-10)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_nothing(monkeypatch, family, attention):
    model = make_model(family)
    batch = make_batch(model, family, images=(0, 0, 0) if family == "gemma3" else (2, 1, 0))
    use_attention(monkeypatch, model, attention)
    # What is computed again does not know of a mode that was on the first time.
    expected = step(model, batch, "shared_prefix", throughout=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # which is when transformers checkpoints
    seen = []
    hook = model.adapter.decoder.layers[0].self_attn.register_forward_hook(lambda *_: seen.append(1))
    assert_same(step(model, batch, "shared_prefix", throughout=False), expected, 1e-8)
    hook.remove()
    assert len(seen) == 6  # three runs, and each again in the backward pass


def test_reentrant_checkpointing_is_refused():
    model = make_model("qwen2_5_vl").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(AMVLError, match="use_reentrant.*False"):
        model(**make_batch(model, "qwen2_5_vl"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [{}, {"prior_ntp_weight": 0.3}, {"stop_gradient": False}])
def test_options_and_tied_embeddings(tied, options):
    model = make_model("qwen2_5_vl")
    if tied:
        model.backbone.lm_head.weight = model.backbone.get_input_embeddings().weight
    batch = make_batch(model, "qwen2_5_vl")
    expected = step(model, batch, "three_pass", **options)
    assert_same(step(model, batch, "shared_prefix", **options), expected, 1e-10)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32(monkeypatch, family, attention):
    model = make_model(family, torch.float32)
    batch = make_batch(model, family, images=(0, 0, 0) if family == "gemma3" else IMAGES)
    expected = step(model, batch, "three_pass")
    use_attention(monkeypatch, model, attention)
    assert_same(step(model, batch, "shared_prefix"), expected, 1e-5)


def test_autocast_is_as_close_to_the_truth_as_three_passes_are():
    model = make_model("qwen2_5_vl", torch.float32)
    batch = make_batch(model, "qwen2_5_vl")
    exact = step(model, batch, "three_pass")
    errors = {}
    for execution in ("three_pass", "shared_prefix"):
        with torch.autocast("cpu", torch.bfloat16):
            rough = step(model, batch, execution)
        errors[execution] = {name: (rough[name] - exact[name]).norm() / exact[name].norm() for name in ("loss", "z")}
        errors[execution]["gradients"] = torch.stack(
            [(rough[name] - value).norm() / value.norm() for name, value in exact.items() if name not in OUTPUTS]
        ).median()
    for name, error in errors["shared_prefix"].items():
        assert error < 2 * errors["three_pass"][name] + 2**-8, name


@compiles
def test_compiled_layers():
    model = make_model("qwen2_5_vl", torch.float32)
    batch = make_batch(model, "qwen2_5_vl")
    expected = step(model, batch, "three_pass")
    for layer in model.adapter.decoder.layers:
        layer.compile()
    assert_same(step(model, batch, "shared_prefix"), expected, 1e-5)


def test_lora():
    import peft

    model = make_model("qwen2_5_vl")
    target = r".*language_model.*\.(q_proj|v_proj|down_proj)"
    lora = peft.LoraConfig(r=2, target_modules=target, init_lora_weights=False)
    model.backbone = peft.get_peft_model(model.backbone, lora)
    model.to(torch.float64)
    batch = make_batch(model, "qwen2_5_vl")
    expected = step(model, batch, "three_pass")
    assert any("lora_A" in name for name in expected)
    assert_same(step(model, batch, "shared_prefix"), expected, 1e-10)


def test_the_end_of_latents_may_be_left_out():
    model = make_model("qwen2_5_vl", end_of_latents=False)
    batch = make_batch(model, "qwen2_5_vl")
    assert_same(step(model, batch, "shared_prefix"), step(model, batch, "three_pass"), 1e-10)


@pytest.mark.parametrize("bound", ["mean", "importance"])
def test_several_samples(bound):
    model = make_model("qwen2_5_vl")
    batch = make_batch(model, "qwen2_5_vl")
    options = dict(num_posterior_samples=3, posterior_bound=bound, prior_ntp_weight=0.2)
    assert_same(step(model, batch, "shared_prefix", **options), step(model, batch, "three_pass", **options), 1e-10)


def test_several_samples_are_several_steps_averaged():
    model = make_model("qwen2_5_vl")
    batch = make_batch(model, "qwen2_5_vl")
    together = step(model, batch, "shared_prefix", num_posterior_samples=3)
    apart = [step(model, batch, "shared_prefix", seed=seed) for seed in (5, 6, 7)]
    means = {name: torch.stack([one[name] for one in apart]).mean(0) for name in together if name != "z"}
    assert_same({name: together[name] for name in means}, means, 1e-10)


def test_the_importance_bound_tightens():
    """Of one sample it is the evidence lower bound's integrand; of more, on average, at most as much."""
    model = make_model("qwen2_5_vl")
    batch = make_batch(model, "qwen2_5_vl")
    with torch.no_grad():
        one = model(**batch, seed=5, posterior_bound="importance")
        gap = lambda mean, logvar: -0.5 * (logvar + (one.z - mean) ** 2 / logvar.exp()).sum((1, 2))  # noqa: E731
        ratio = gap(one.prior_mean, one.prior_logvar) - gap(one.posterior_mean, one.posterior_logvar)
        plain = model(**batch, seed=5)
        torch.testing.assert_close(one.nll, plain.nll - ratio)
        many = [model(**batch, seed=8 * i, posterior_bound="importance", num_posterior_samples=8).nll for i in range(8)]
        single = [model(**batch, seed=i, posterior_bound="importance").nll for i in range(64)]
    assert (torch.stack(many).mean(0) < torch.stack(single).mean(0)).all()


def test_the_vision_tower_runs_once_and_without_a_graph():
    model = make_model("qwen2_5_vl")
    batch, seen = make_batch(model, "qwen2_5_vl"), []
    model.adapter.vision_tower.register_forward_hook(lambda _, __, out: seen.append(out.pooler_output.requires_grad))
    model(**batch, prior_ntp_weight=1.0).loss.backward()
    assert seen == [False]


def test_the_prompt_runs_once_and_the_branches_in_pairs():
    model = make_model("qwen2_5_vl")
    batch = make_batch(model, "qwen2_5_vl", images=(0, 0, 0))
    rows = []
    model.adapter.decoder.layers[0].register_forward_hook(lambda _, args, __: rows.append(args[0].shape[1]))
    model(**batch, prior_ntp_weight=1.0)
    longest = int((batch["labels"] != -100).sum(1).max())
    prompt = int(((batch["labels"] == -100) & (batch["attention_mask"] == 1)).sum(1).max())
    assert rows == [prompt, 3 + longest + 3, 2 * (3 + 1 + longest)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_posterior_samples": 0}, "num_posterior_samples is 0"),
        ({"posterior_bound": "best"}, "posterior_bound='best' is not known"),
        ({"execution": "three_pass", "padding_free": True}, "padding_free goes with execution='shared_prefix'"),
    ],
)
def test_options_that_do_not_exist(options, message):
    model = make_model("qwen2_5_vl")
    with pytest.raises(AMVLError, match=message):
        model(**make_batch(model, "qwen2_5_vl"), **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_and_their_tokens_must_agree(family):
    model = make_model(family)
    batch = make_batch(model, family)
    image = (batch["input_ids"] == IMAGE).nonzero()[0]
    batch["input_ids"][tuple(image)] = 5
    with pytest.raises(AMVLError, match="image tokens, but pixel_values make"):
        model(**batch)
    del batch["pixel_values"]
    batch.pop("image_grid_thw", None)
    with pytest.raises(AMVLError, match="pixel_values are missing"):
        model(**batch)


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_generating_without_what_the_decoder_needs_is_refused(family):
    model = make_model(family)
    batch = make_batch(model, family)
    del batch["labels"]
    with pytest.raises(AMVLError, match="generating.* is not supported yet"):
        model.generate(**batch)


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"gemma3"}))
def test_every_other_family_generates(family):
    """After images where its decoder takes embeddings alone, and after text everywhere."""
    model = make_model(family)
    batch = make_batch(model, family, images=(0, 0, 0) if family == "qwen3_vl" else IMAGES)
    keep = batch.pop("labels") == -100
    batch["attention_mask"] = batch["attention_mask"] * keep
    out = model.generate(**batch, seed=1, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=63)
    assert out.shape == (3, batch["input_ids"].shape[1] + 3)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_flex_attention_says_the_same(monkeypatch, family):
    """Without gradients, which PyTorch's flex attention has on GPUs alone, and not compiled."""
    monkeypatch.setattr(flex, "compile_friendly_flex_attention", lambda *qkv, training, **k: flex_attention(*qkv, **k))
    model = make_model(family, head_dim=16)
    batch = make_batch(model, family, images=(0, 0, 0) if family == "gemma3" else IMAGES)
    with torch.no_grad():
        expected = model(**batch, seed=5)
        model.adapter.decoder.set_attn_implementation("flex_attention")
        got = model(**batch, seed=5)
    for name in OUTPUTS:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-7)


def test_an_attention_that_nobody_knows_is_refused():
    model = make_model("qwen2_5_vl")
    model.adapter.decoder.config._attn_implementation_internal = "paged_something"
    with pytest.raises(AMVLError, match="attn_implementation='paged_something'.*three_pass"):
        model(**make_batch(model, "qwen2_5_vl"))


def test_padding_free_needs_a_flash_attention():
    model = make_model("qwen2_5_vl")
    with pytest.raises(AMVLError, match="padding_free needs a flash attention.*'sdpa'"):
        model(**make_batch(model, "qwen2_5_vl"), padding_free=True)


def test_layers_that_bypass_the_interface_are_refused(monkeypatch):
    model = make_model("qwen2_5_vl")
    model.adapter.decoder.config.num_hidden_layers += 1
    with pytest.raises(AMVLError, match="1 of 3 layers of Qwen2_5_VLTextModel do not"):
        model(**make_batch(model, "qwen2_5_vl"))


def test_other_models_are_left_alone():
    """What is registered does what was there, for whoever does not ask for more."""
    model = make_model("qwen2_5_vl")
    batch = make_batch(model, "qwen2_5_vl")
    before = model.backbone(**batch).loss
    model(**batch)
    assert torch.equal(model.backbone(**batch).loss, before)


def test_a_training_loop_of_ones_own():
    """`run_prompts` alone: each branch is what the backbone says of prompt and branch together."""
    model = make_model("qwen2_5_vl")
    backbone, batch = model.backbone, make_batch(model, "qwen2_5_vl", images=(2, 1, 1))
    labels = batch.pop("labels")
    prompt = batch | {"attention_mask": batch["attention_mask"] * (labels == -100)}
    prefix = amvl_fast.run_prompts(backbone, **prompt)
    ids = torch.randint(3, 50, (2, 3, 4))
    branches = prefix.run([amvl_fast.Branch(backbone.get_input_embeddings()(i)) for i in ids])
    for i, hidden in zip(ids, branches, strict=True):
        for row in range(3):
            keep = prompt["attention_mask"][row].bool()
            patches = batch["image_grid_thw"].prod(1).tolist()
            images, first = (2, 1, 1)[row], sum((2, 1, 1)[:row])
            ids_of_row = torch.cat([batch["input_ids"][row, keep], i[row]])
            whole = backbone(
                input_ids=ids_of_row[None],
                pixel_values=torch.cat(batch["pixel_values"].split(patches)[first : first + images]),
                image_grid_thw=batch["image_grid_thw"][first : first + images],
                mm_token_type_ids=(ids_of_row == IMAGE).int()[None],
            )
            torch.testing.assert_close(backbone.lm_head(hidden[row]), whole.logits[0, -4:], rtol=1e-6, atol=1e-6)
