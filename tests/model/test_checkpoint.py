"""Saving, loading, and configurations that are refused."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM

from amvl_fast import AMVLConfig, AMVLModel
from amvl_fast.configuration import FORMAT_VERSION
from amvl_fast.errors import AMVLError


@pytest.fixture
def saved(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


def test_a_reloaded_model_is_the_model(model, saved, batch, collate, rows):
    again = AMVLModel.from_pretrained(saved)
    a, b = (m.config.to_dict() | {"_name_or_path": None} for m in (again, model))
    assert a == b
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(again(**batch, seed=1).loss, model(**batch, seed=1).loss)
    prompt = collate(rows, with_answer=False)
    answers = [m.generate(**prompt, seed=2, max_new_tokens=8) for m in (model, again)]
    assert torch.equal(*answers)


def test_generation_defaults_come_back(model, tmp_path, collate, rows):
    model.backbone.generation_config.update(repetition_penalty=3.0, max_new_tokens=7, eos_token_id=[1, 2, 5])
    model.save_pretrained(tmp_path)
    again = AMVLModel.from_pretrained(tmp_path)
    assert again.backbone.generation_config.to_diff_dict() == model.backbone.generation_config.to_diff_dict()
    prompt = collate(rows, with_answer=False)
    assert torch.equal(*(m.generate(**prompt, seed=2) for m in (model, again)))


def test_modules_added_to_a_loaded_backbone_keep_their_weights(base):
    backbone = AutoModelForImageTextToText.from_pretrained(base)
    backbone.model.extra = torch.nn.Linear(4, 4)
    torch.nn.init.zeros_(backbone.model.extra.weight)  # as adapters do
    before = {name: p.clone() for name, p in backbone.named_parameters()}
    AMVLModel.from_backbone(backbone, AMVLConfig(num_latents=2, latent_dim=4))
    assert all(torch.equal(before[name], p) for name, p in backbone.named_parameters())


def test_tied_embeddings_stay_tied_and_weights_are_safetensors_only(saved):
    again = AMVLModel.from_pretrained(saved)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert {path.suffix for path in saved.iterdir()} <= {".json", ".jinja", ".safetensors"}


def test_the_processor_loads_from_the_checkpoint(saved, processor):
    again = AutoProcessor.from_pretrained(saved)
    assert type(again) is type(processor)
    assert again.chat_template == processor.chat_template
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_dtype_and_attention_are_chosen_as_in_transformers(saved):
    again = AMVLModel.from_pretrained(saved, dtype=torch.float32, attn_implementation="eager")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert again.backbone.model.language_model.config._attn_implementation == "eager"


def test_from_backbone_takes_a_model_as_it_is(base, batch):
    backbone = AutoModelForImageTextToText.from_pretrained(base).eval()
    before = backbone(**batch).logits
    model = AMVLModel.from_backbone(backbone, AMVLConfig(num_latents=2, latent_dim=4))
    assert model.backbone is backbone
    assert backbone.config._attn_implementation == "sdpa"
    assert torch.equal(backbone(**batch).logits, before)


def test_z_enters_at_the_scale_of_token_embeddings(base):
    model = AMVLModel.from_backbone(str(base), AMVLConfig(num_latents=2, latent_dim=64))
    embeddings = model.get_input_embeddings().weight.square().mean().sqrt()
    entered = model.latents.projection(torch.randn(100, 2, 64)).square().mean().sqrt()
    assert abs(entered / embeddings - 1) < 0.02


def test_slots_and_end_start_from_the_token_that_ends_the_prompt(base):
    config = AMVLConfig(num_latents=40, latent_dim=2)
    model = AMVLModel.from_backbone(str(base), config, end_token_id=7)
    table = model.get_input_embeddings().weight
    assert torch.equal(model.latents.end[0], table[7])
    spread = (model.latents.slots - table[7]).square().mean().sqrt() / table.square().mean().sqrt()
    assert abs(spread - 0.3) < 0.03
    without = AMVLModel.from_backbone(str(base), config)
    assert torch.equal(without.latents.end[0], without.get_input_embeddings().weight.mean(0))


def test_log_variances_start_where_asked_and_stay_bounded(base):
    config = AMVLConfig(num_latents=2, latent_dim=64, logvar_min=-5.0, logvar_max=1.0, logvar_init=-2.0)
    head = AMVLModel.from_backbone(str(base), config).latents.posterior_head
    start = head(torch.randn(50, 2, 32)).logvar
    assert abs(start.mean() + 2) < 0.05 and start.std() < 0.3
    extreme = head(1e4 * torch.randn(50, 2, 32)).logvar
    assert extreme.min() >= -5 and extreme.max() <= 1 and extreme.max() - extreme.min() > 5.9


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_latents": 0}, "num_latents is 0, but must be at least 1"),
        ({"latent_dim": 0}, "latent_dim is 0, but must be at least 1"),
        ({"logvar_init": 9.0}, "logvar_min < logvar_init < logvar_max"),
        ({"kl_reduction": "median"}, "kl_reduction is 'median'"),
        ({"latent_temperature": -0.5}, "latent_temperature is -0.5"),
    ],
)
def test_bad_configurations_are_refused(values, words):
    with pytest.raises(AMVLError, match=words):
        AMVLConfig(**values)


def test_a_checkpoint_of_a_newer_format_is_refused(saved):
    path = saved / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": FORMAT_VERSION + 1}))
    with pytest.raises(AMVLError, match="upgrade amvl_fast"):
        AMVLModel.from_pretrained(saved)


def test_an_unsupported_backbone_is_refused():
    tiny = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    with pytest.raises(AMVLError, match="'llama'.*not supported; use one of: gemma3, .*qwen2_5_vl"):
        AMVLModel.from_backbone(LlamaForCausalLM(tiny))


def test_a_model_without_a_backbone_is_refused():
    with pytest.raises(AMVLError, match="from_backbone"):
        AMVLModel(AMVLConfig())
