"""Features of images kept on disk: training with them is training without them, whatever happens to the files."""

import errno
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model.conftest import chat_row
from model.families import CONFIGS, make_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from amvl_fast import AMVLConfig, AMVLError, AMVLModel, vision_cache
from amvl_fast.data import ChatCollator, ChatDataset
from amvl_fast.training import parts, read_config, train, trainer
from amvl_fast.training import run as runs
from amvl_fast.vision_cache import CachedCollator, VisionCache

from .trajectories import PLAIN, assert_same_trajectory, logs, same, weights

DRIVER = Path(__file__).with_name("vision_cache_process.py")
# Of the rows in conftest.py: three colours of two sizes.
IMAGES = 6


@pytest.fixture
def run(settings, write, tmp_path, monkeypatch):
    """Runs by name; with `cached`, options of `fill`, their tower may not be called once the cache is filled."""

    def run(name, cached=None, dtype="float64", **training):
        settings["model"]["dtype"] = dtype
        settings["training"] |= PLAIN | {"max_steps": 6, "per_device_train_batch_size": 8, **training}
        settings["training"]["output_dir"] = str(tmp_path / name)
        config = read_config(write(settings))
        with monkeypatch.context() as patch:
            if cached is not None:
                wire(patch, tmp_path / f"{name}_cache", torch.bfloat16 if training.get("bf16") else None, cached)
            assert train(config) is None
        return config.output_dir

    return run


def wire(patch, directory, autocast, options):
    load, numbered, caches = runs.load_model, trainer.Numbered, []

    def load_and_fill(config, processor, row):
        model = load(config, processor, row)
        caches.append(VisionCache(directory, model, processor, autocast=autocast))
        rows = ChatDataset(config.data.train)
        assert caches[0].fill(rows, ChatCollator(processor), **options) == (IMAGES, IMAGES)
        model.adapter.vision_tower.register_forward_pre_hook(refuse)
        return model

    patch.setattr(runs, "load_model", load_and_fill)
    patch.setattr(trainer, "Numbered", lambda collator: numbered(CachedCollator(collator, caches[0])))


def refuse(*args):
    raise AssertionError("the tower was called in training")


@pytest.fixture(scope="session")
def processor(inputs):
    return AutoProcessor.from_pretrained(inputs / "base")


@pytest.fixture
def model(inputs):
    torch.manual_seed(0)
    backbone = AutoModelForImageTextToText.from_pretrained(inputs / "base")
    return AMVLModel.from_backbone(backbone, AMVLConfig(num_latents=2, latent_dim=4))


@pytest.fixture
def rows():
    """Two images, one, none, and the same one again."""
    colours = [("red", "blue"), ("green",), (), ("green",)]
    return [{**chat_row(f"colour {i}?", "red", c, (32, 48)), "row": i} for i, c in enumerate(colours)]


@pytest.fixture
def cache(tmp_path, model, processor):
    return VisionCache(tmp_path / "cache", model, processor)


@pytest.fixture
def collator(processor):
    return ChatCollator(processor)


def files(cache):
    return sorted(path for path in cache.entries.directory.rglob("*") if path.is_file())


# Training


@pytest.mark.parametrize("mixed", [{}, {"bf16": True, "dtype": "float32"}])
def test_training_is_the_same_to_the_last_bit(run, mixed):
    """Where the tower sees the same batches, here of one sample: matrix products may round otherwise in larger ones."""
    one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, **mixed}
    plain, cached = run("plain", **one), run("cached", cached={"batch_size": 1}, **one)
    assert same(weights(cached), weights(plain))
    a, b = ([{k: v for k, v in e.items() if not k.endswith("_per_second")} for e in logs(r)] for r in (cached, plain))
    assert a == b


@pytest.mark.parametrize(
    "way",
    [
        {},
        {"gradient_checkpointing": True},
        {"execution": "three_pass"},
        {"dataloader_num_workers": 2},
        {"train_sampling_strategy": "batch_rebalance"},
    ],
)
def test_training_is_the_same_with_features_of_other_batches(run, way):
    assert_same_trajectory(run("cached", cached={"batch_size": 5}, **way), run("plain", **way))


def test_training_with_lora_is_the_same(run, settings):
    settings["lora"] = {"r": 2, "lora_alpha": 4}
    assert_same_trajectory(run("cached", cached={}), run("plain"))


def test_features_are_those_of_the_batch(cache, collator, rows, model):
    """Samples with several images, with none, and with those of another, in any order."""
    assert cache.fill(rows, collator) == (2, 2)
    cached = CachedCollator(collator, cache)
    for order in ((0, 1, 2, 3), (3, 2, 0), (1, 0), (2,)):
        chosen = [rows[i] for i in order]
        plain, batch = collator(chosen), cached(chosen)
        assert "pixel_values" not in batch and ("image_features" in batch) == ("pixel_values" in plain)
        expected, got = model(**plain, seed=1), model(**batch, seed=1)
        torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(got.prior_mean, expected.prior_mean, rtol=1e-4, atol=1e-5)


def test_workers_get_the_cache_without_the_model(cache, collator, rows):
    cache.fill(rows, collator)
    packed = pickle.dumps(CachedCollator(None, cache))
    assert len(packed) < 10_000
    key = cache.key(rows[0]["images"])
    assert same(pickle.loads(packed).cache.read(key), cache.read(key))


# Filling


def test_filling_goes_on_where_it_stopped(cache, collator, rows, model):
    random = torch.get_rng_state()
    model.train()
    assert cache.fill(rows[:1], collator) == (1, 1)
    assert cache.fill(rows, collator, batch_size=1) == (1, 2)
    assert cache.fill(rows, collator, workers=1) == (0, 2)
    assert len(files(cache)) == 2
    assert torch.equal(torch.get_rng_state(), random) and all(module.training for module in model.modules())


def test_processes_share_the_rows(cache, collator, rows, monkeypatch):
    monkeypatch.setattr(vision_cache, "BLOCK", 1)
    done = [cache.fill(rows, collator, process=process, processes=3) for process in range(3)]
    assert done == [(2, 2), (0, 1), (0, 0)] and cache.fill(rows, collator) == (0, 2)


def start(inputs, cache, deadly_entry=0):
    """A process that fills the cache with the training rows, and kills itself while it writes the entry so numbered."""
    command = [sys.executable, str(DRIVER), str(inputs), str(cache.entries.directory), str(deadly_entry)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, env=environment)


def test_processes_fill_the_same_entries_at_once_after_one_was_killed(inputs, cache, collator):
    assert start(inputs, cache, deadly_entry=3).wait(300) == -signal.SIGKILL
    assert sum(path.suffix == ".safetensors" for path in files(cache)) == 2
    processes = [start(inputs, cache), start(inputs, cache)]
    assert [process.wait(300) for process in processes] == [0, 0]
    assert sum(path.suffix == ".safetensors" for path in files(cache)) == IMAGES
    assert cache.fill(ChatDataset(inputs / "train.jsonl"), collator) == (0, IMAGES)


def test_a_killed_process_leaves_what_it_had_finished(inputs, cache, collator):
    assert start(inputs, cache, deadly_entry=3).wait(300) == -signal.SIGKILL
    finished = [path for path in files(cache) if path.suffix == ".safetensors"]
    unfinished = [path for path in files(cache) if path.suffix != ".safetensors"]
    assert len(finished) == 2 and len(unfinished) == 1 and unfinished[0].name.startswith(".")
    assert cache.fill(ChatDataset(inputs / "train.jsonl"), collator) == (IMAGES - 2, IMAGES)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_nothing(cache, collator, rows, monkeypatch, call, error):
    def fail(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(AMVLError if isinstance(error, OSError) else KeyboardInterrupt) as raised:
            cache.fill(rows, collator)
    if isinstance(error, OSError):
        assert "No space left" in str(raised.value) and "data.vision_cache" in str(raised.value)
    assert files(cache) == [] and cache.fill(rows, collator) == (2, 2)


# Damage


def test_every_flipped_bit_and_every_cut_is_noticed(cache, collator, rows):
    cache.fill(rows[1:2], collator)
    [path], key = files(cache), cache.key(rows[1]["images"])
    whole = path.read_bytes()
    broken = [whole[:n] for n in range(len(whole))]
    broken += [whole[:n] + bytes([whole[n] ^ 1 << n % 8]) + whole[n + 1 :] for n in range(len(whole))]
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(AMVLError, match="remove it and run the same command again"):
            cache.read(key)
    with pytest.raises(AMVLError, match="remove it"):
        CachedCollator(collator, cache)(rows[1:2])
    assert cache.fill(rows[1:2], collator) == (1, 1) and path.read_bytes() == whole


def test_an_entry_under_another_name_is_noticed(cache, collator, rows):
    cache.fill(rows, collator)
    first, second = (cache.entries.path(cache.key(row["images"])) for row in rows[:2])
    second.write_bytes(first.read_bytes())
    with pytest.raises(AMVLError, match="is not what was written"):
        cache.read(cache.key(rows[1]["images"]))


def test_a_missing_entry_ends_training(cache, collator, rows):
    cache.fill(rows[:1], collator)
    with pytest.raises(AMVLError, match="no entry for the images of row 1"):
        CachedCollator(collator, cache)(rows)


# Keys


def test_keys_follow_from_pixels(cache):
    dots = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "red"), Image.new("RGB", (2, 8), "red")
    dots[1].putpixel((3, 3), (254, 0, 0))
    indexed = [Image.new("P", (4, 4), 0) for _ in range(2)]
    indexed[0].putpalette([1, 2, 3])
    lists = [[dot] for dot in dots] + [
        [dots[0], dots[1]],
        [dots[1], dots[0]],
        [dots[0]] * 2,
        [indexed[0]],
        [indexed[1]],
    ]
    keys = [cache.key(images) for images in lists]
    assert len(set(keys)) == len(keys) and cache.key([dots[0].copy()]) == keys[0]


def test_keys_follow_from_all_that_makes_features(tmp_path, inputs):
    def key(change=lambda model, processor: None, **options):
        model, processor = make_model("llava", torch.float32), AutoProcessor.from_pretrained(inputs / "base")
        parts.freeze(model, ["vision_tower", "connector"])
        change(model, processor)
        return VisionCache(tmp_path, model, processor, **options).key([Image.new("RGB", (4, 4))])

    def add(parameter):
        parameter.data.view(-1)[-1] += 1e-3

    def mean(model, processor):
        processor.image_processor.image_mean = [0.5, 0.5, 0.4]

    changes = [
        lambda model, _: add(list(model.adapter.vision_tower.parameters())[-1]),
        lambda model, _: add(model.adapter.inner.multi_modal_projector.linear_2.bias),
        lambda model, _: model.adapter.vision_tower.to(torch.bfloat16),
        lambda model, _: model.adapter.vision_tower.set_attn_implementation("eager"),
        lambda model, _: setattr(model.backbone.config, "vision_feature_layer", -1),
        mean,
    ]
    keys = [key(), key(autocast=torch.bfloat16), *map(key, changes)]
    assert len(set(keys)) == len(keys)
    # And from nothing else.
    assert key(lambda model, _: add(model.get_output_embeddings().weight)) == keys[0]
    assert key(lambda model, _: add(model.latents.slots)) == keys[0]


# Refusals


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_goes_with_a_cache_once_its_parts_are_frozen(tmp_path, family, processor):
    model = make_model(family, torch.float32)
    parts.freeze(model, ["vision_tower", "connector"])
    VisionCache(tmp_path, model, processor)


@pytest.mark.parametrize(
    "trained, named", [("vision_tower", "the vision_tower would"), ("connector", "the connector w")]
)
def test_what_is_trained_is_refused(tmp_path, processor, trained, named):
    model = make_model("llava_onevision", torch.float32)
    parts.freeze(model, {"vision_tower", "connector"} - {trained})
    model.adapter.vision_tower.requires_grad_(trained == "vision_tower")
    with pytest.raises(AMVLError, match=f"{named}.*set model.freeze"):
        VisionCache(tmp_path, model, processor)


def test_dropout_in_the_tower_is_refused(tmp_path, processor):
    model = make_model("llava", torch.float32)
    parts.freeze(model, ["vision_tower", "connector"])
    model.adapter.vision_tower.config.attention_dropout = 0.1
    with pytest.raises(AMVLError, match="attention_dropout"):
        VisionCache(tmp_path, model, processor)


def test_a_plain_model_is_refused(tmp_path, model, processor):
    with pytest.raises(AMVLError, match="plain Qwen2_5_VL.*leave data.vision_cache out"):
        VisionCache(tmp_path, model.backbone, processor)
