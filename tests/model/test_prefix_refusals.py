"""What cannot share a prompt is refused by name, and what is shared is let go of."""

import gc
import weakref

import peft
import pytest
import torch
from torch._dynamo.utils import counters
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import amvl_fast
from amvl_fast.errors import AMVLError
from amvl_fast.prefix import prefix as prefix_module

from .families import make_batch, make_model


def refused(message, family, change):
    """A step of a model whose decoder's configuration is changed once it is built."""
    model = make_model(family)
    batch = make_batch(model, family)
    for name, value in change.items():
        setattr(model.adapter.decoder.config, name, value)
    with pytest.raises(AMVLError, match=message):
        model(**batch)


def test_decoders_that_are_not_causal():
    refused("Gemma3TextModel attends in both directions", "gemma3", {"use_bidirectional_attention": True})
    refused("LlamaModel is not causal", "llava", {"is_causal": False})


def test_layers_that_are_not_causal():
    model = make_model("qwen2_5_vl")
    model.adapter.decoder.layers[1].self_attn.is_causal = False
    with pytest.raises(AMVLError, match="layer 1, Qwen2_5_VLAttention, is not causal"):
        model(**make_batch(model, "qwen2_5_vl"))


@pytest.mark.parametrize(
    ("name", "value"), [("layer_types", ["full_attention", "chunked_attention"]), ("attention_chunk_size", 8)]
)
def test_masks_that_nobody_knows(name, value):
    refused("chunk", "llava", {name: value})


def test_windows_that_attention_is_not_told():
    refused("does not tell its attention the sliding window of layer 0", "llava", {"sliding_window": 4})


def test_rotations_that_change_with_the_length():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16}
    refused("dynamic rotary embeddings change at 16 rows", "llava", {"rope_parameters": rope})
    nested = {"full_attention": {**rope, "rope_type": "longrope"}, "sliding_attention": {"rope_type": "default"}}
    refused("longrope rotary embeddings change", "gemma3", {"rope_parameters": nested})


def test_short_sequences_do_not_reach_such_a_change():
    model = make_model("llava")
    rope = model.adapter.decoder.config.rope_parameters
    model.adapter.decoder.config.rope_parameters = {**rope, "rope_type": "dynamic", "factor": 2.0}
    model(**make_batch(model, "llava"))


def test_prompt_learning():
    model = make_model("qwen2_5_vl")
    learning = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model.backbone = peft.PeftModel(model.backbone, learning)
    with pytest.raises(AMVLError, match="PEFT's prompt learning is not supported"):
        model(**make_batch(make_model("qwen2_5_vl"), "qwen2_5_vl"))


def test_inputs_that_nobody_reads_and_prompts_that_are_none():
    model = make_model("qwen2_5_vl")
    batch = make_batch(model, "qwen2_5_vl", images=(0, 0, 0))
    del batch["labels"]
    with pytest.raises(AMVLError, match="does not take the inputs .'video_grid_thw'"):
        amvl_fast.run_prompts(model.backbone, **batch, video_grid_thw=torch.ones(1, 3))
    batch["attention_mask"][1] = 0
    with pytest.raises(AMVLError, match="Row 1 of the batch has no prompt"):
        amvl_fast.run_prompts(model.backbone, **batch)


def test_an_attention_that_is_overridden_takes_prefixes_too(monkeypatch):
    calls = []

    def own(*args, **kwargs):
        calls.append(type(args[0]).__name__)
        return ALL_ATTENTION_FUNCTIONS._global_mapping["sdpa"](*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", own)
    model = make_model("qwen2_5_vl")
    batch = make_batch(model, "qwen2_5_vl")
    calls.clear()
    model(**batch)
    assert calls.count("Qwen2_5_VLAttention") == 6  # three runs of two layers


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_without_a_backward_pass_is_freed(monkeypatch, checkpointing):
    model = make_model("qwen2_5_vl").train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    alive = []
    monkeypatch.setattr(
        prefix_module.Prefix,
        "__init__",
        lambda self, *args, made=prefix_module.Prefix.__init__: (
            made(self, *args),
            alive.append(weakref.ref(self)),
            None,
        )[-1],
    )
    model(**make_batch(model, "qwen2_5_vl"))
    gc.collect()
    assert [ref() for ref in alive] == [None]


def test_compiled_layers_share_their_graphs():
    """However many there are: nothing that is kept for each layer becomes a guard."""
    graphs = {}
    for layers in (2, 12):
        torch._dynamo.reset()
        counters.clear()
        model = make_model(
            "qwen2_5_vl", torch.float32, num_hidden_layers=layers, layer_types=["full_attention"] * layers
        )
        for layer in model.adapter.decoder.layers:
            layer.compile(backend="eager")
        batch = make_batch(model, "qwen2_5_vl")
        model(**batch).loss.backward()
        graphs[layers] = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    assert graphs[12] == graphs[2]


def test_a_frozen_tower_gets_no_graph_from_inputs_that_require_gradients():
    model = make_model("qwen2_5_vl")
    batch, seen = make_batch(model, "qwen2_5_vl"), []
    model.enable_input_require_grads()
    model.adapter.vision_tower.register_forward_hook(lambda _, __, out: seen.append(out.pooler_output.requires_grad))
    model(**batch).loss.backward()
    assert seen == [False]
