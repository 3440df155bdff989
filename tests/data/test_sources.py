"""Files, folders, tar shards and hub datasets give the same rows, converted or streamed."""

import io
import json
import multiprocessing
import tarfile

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from chat_rows import IMAGE, ROW, assistant, refusal, row, user, write
from PIL import Image

from amvl_fast.data import ChatDataset, ChatStream

ROWS = [
    ROW | {"kind": "one"},
    row(user("green?", IMAGE, IMAGE), assistant("no"), images=["red.png", "blue.png"]) | {"kind": "two"},
    row(user("say it"), assistant("it"), images=[]) | {"kind": "three"},
    *[row(user(IMAGE, f"{n}?"), assistant(str(n)), images=["green.png"]) | {"kind": str(n)} for n in range(4)],
]


def with_bytes(folder, rows):
    """The rows as `datasets` stores them with their images in."""
    return [
        {**each, "images": [{"bytes": (folder / name).read_bytes(), "path": name} for name in each["images"]]}
        for each in rows
    ]


def add(shard, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))


def write_tar(path, folder, rows, *, start=0):
    with tarfile.open(path, "w") as shard:
        for number, each in enumerate(rows, start=start):
            stem = f"shard/{number:04}"
            images = [(folder / name).read_bytes() for name in each["images"]]
            names = [f"{stem}.png"] if len(images) == 1 else [f"{stem}.{n}.png" for n in range(len(images))]
            for name, content in reversed(list(zip(names, images, strict=True))):  # in any order
                add(shard, name, content)
            add(shard, f"{stem}.json", json.dumps({**each, "images": []}).encode())
            add(shard, f"{stem}.txt", b"a caption that nobody asked for")


def make(form, folder):
    """A source of ROWS in one of many forms."""
    place = folder / "source"
    place.mkdir()
    table = pyarrow.Table.from_pylist
    if form == "jsonl":
        return write(folder, ROWS)
    if form == "json":
        (folder / "rows.json").write_text(" " + json.dumps(ROWS, indent=1))
        return folder / "rows.json"
    if form in ("folder of jsonl", "pattern", "list"):
        parts = [write(place, part, f"part-{n}.jsonl") for n, part in enumerate((ROWS[:3], ROWS[3:5], ROWS[5:]))]
        return {"folder of jsonl": place, "pattern": f"{place}/part-*.jsonl", "list": parts}[form]
    if form == "mixed list":
        pyarrow.parquet.write_table(table(with_bytes(folder, ROWS[2:5])), folder / "rows.parquet")
        write_tar(folder / "rows.tar", folder, ROWS[5:])
        return [write(folder, ROWS[:2]), folder / "rows.parquet", folder / "rows.tar"]
    if form == "parquet with bytes":
        pyarrow.parquet.write_table(table(with_bytes(folder, ROWS)), place / "rows.parquet")
        return place / "rows.parquet"
    if form in ("tar", "folder of tar"):
        write_tar(place / "00.tar", folder, ROWS[:4])
        write_tar(place / "01.tar", folder, ROWS[4:], start=4)
        return place if form == "folder of tar" else [place / "00.tar", place / "01.tar"]
    images = datasets.Dataset.from_list(with_bytes(folder, ROWS)).cast_column("images", datasets.List(datasets.Image()))
    if form == "arrow":
        images.save_to_disk(folder / "saved")
        return next((folder / "saved").glob("*.arrow"))
    if form == "saved":
        images.save_to_disk(place)
    if form == "saved splits":
        datasets.DatasetDict({"test": images.select([0]), "train": images}).save_to_disk(place)
    if form == "repository":
        (place / "data").mkdir()
        (place / "README.md").write_text("---\nlicense: mit\n---\n# Rows\n")
        for split, part in (("train", images), ("test", images.select([0]))):
            part.to_parquet(place / "data" / f"{split}-00000-of-00001.parquet")
    return place


FORMS = [
    *(
        "jsonl",
        "json",
        "folder of jsonl",
        "pattern",
        "list",
        "mixed list",
        "parquet with bytes",
        "tar",
        "folder of tar",
    ),
    *("arrow", "saved", "saved splits", "repository"),
]


@pytest.mark.parametrize("form", FORMS)
def test_every_source_gives_the_same_rows_at_once_and_as_a_stream(folder, form, monkeypatch):
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_: pytest.fail("decoded by the library"))
    source = make(form, folder)
    dataset = ChatDataset(source, image_root=folder)
    dataset.validate()
    stream = ChatStream(source, image_root=folder)
    stream.validate()
    given = [dataset[number] for number in range(len(dataset))]
    assert dataset.answers() == [each["messages"][-1]["content"][0]["text"] for each in ROWS]
    for items in (given, list(stream)):
        assert [item["row"] for item in items] == list(range(len(ROWS)))
        for item, each in zip(items, ROWS, strict=True):
            assert (item["messages"], item["kind"]) == (each["messages"], each["kind"])
            assert len(item["images"]) == len(each["images"])
            for image, name in zip(item["images"], each["images"], strict=True):
                with Image.open(folder / name) as stored:
                    assert image.tobytes() == stored.tobytes()
    assert dataset.column("kind") == [each["kind"] for each in ROWS]
    part = dataset.subset(3, seed=1)
    assert part.answers() == [part[n]["answer"] for n in range(3)]
    assert len(list(ChatStream(source, image_root=folder, max_rows=3))) == 3


def test_rows_of_a_list_are_named_in_their_own_file_and_have_their_own_root(folder):
    other = folder / "other"
    other.mkdir()
    (other / "red.png").write_bytes((folder / "green.png").read_bytes())
    first, second = write(folder, [ROW]), write(other, [ROW, row(user("n?"), images=[])])
    dataset = ChatDataset([first, second])
    assert [dataset[n]["images"][0].size for n in range(2)] == [(64, 64), (32, 48)]
    for call in (dataset.validate, lambda: dataset[2]):
        assert f"row 1 (counted from 0) of {second}" in refusal(call)


def test_a_folder_of_several_splits_gives_one(folder):
    write(folder, ROWS[:2], "train.jsonl")
    write(folder, ROWS[2:3], "train-2.jsonl")
    write(folder, ROWS[3:4], "rows_test.jsonl")
    assert len(ChatDataset(folder)) == 3
    assert len(ChatDataset(folder, split="test")) == 1
    assert "has no file of the split 'validation'" in refusal(lambda: ChatDataset(folder, split="validation"))


def test_a_folder_of_several_kinds_is_refused(folder):
    write(folder, ROWS)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    ChatDataset(folder)  # both are JSON
    write_tar(folder / "rows.tar", folder, ROWS)
    assert "files of several kinds (.json, .jsonl, .tar)" in refusal(lambda: ChatDataset(folder))


def test_what_is_nowhere_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "data/rows.jsonl", "rows", "a/b/c", "*.jsonl"):
        assert (
            refusal(lambda name=name: ChatDataset(name))
            == f"{name} does not exist: correct the path of the data file or folder."
        )
    assert "list of data sources is empty" in refusal(lambda: ChatDataset([]))
    (tmp_path / "empty").mkdir()
    assert "empty cannot be read" in refusal(lambda: ChatDataset("empty"))


def test_a_hub_dataset_is_loaded_by_name_and_a_failed_download_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def unreachable(*names, **options):
        asked.append((names, options))
        raise ConnectionError("Couldn't reach the Hub.\nIs there a network?")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for call in (lambda: ChatDataset("org/rows", split="dev"), lambda: next(iter(ChatStream("org/rows", split="dev")))):
        message = refusal(call)
        assert message.startswith("org/rows is neither a local file or folder nor a data set of the hub")
        assert "(Couldn't reach the Hub. Is there a network?): correct its name" in message
    options = [{"split": "dev", "streaming": streaming} for streaming in (False, True)]
    assert asked == [(("org/rows",), each) for each in options]
    (tmp_path / "org" / "rows").mkdir(parents=True)
    write(tmp_path / "org" / "rows", [ROWS[2]])
    assert ChatDataset("org/rows")[0]["answer"] == "it"  # local paths win


def test_paths_of_a_hub_dataset_need_a_root(folder, monkeypatch):
    monkeypatch.chdir(folder)
    table = datasets.Dataset.from_list([ROW])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    assert "no image_root says where it starts from" in refusal(lambda: ChatDataset("org/rows")[0])
    assert ChatDataset("org/rows", image_root=folder)[0]["images"][0].size == (64, 64)


def test_a_changed_tar_shard_is_read_anew(folder):
    path = folder / "rows.tar"
    for rows in (ROWS[:1], ROWS[1:3]):
        write_tar(path, folder, rows)
        assert ChatDataset(path).answers() == [each["messages"][-1]["content"][0]["text"] for each in rows]


def test_bad_tar_shards_are_named(folder):
    path = folder / "rows.tar"
    write_tar(path, folder, ROWS)
    whole = path.read_bytes()
    for size in (1500, 2560, len(whole) // 2 + 3):  # within a header, between members, in the padding
        path.write_bytes(whole[:size])
        assert f"{path} cannot be read (" in refusal(lambda: ChatDataset(path))
        assert f"{path} cannot be read (" in refusal(lambda: list(ChatStream(path)))
    with tarfile.open(path, "w"):
        pass
    assert f"{path} is empty" in refusal(lambda: ChatDataset(path))
    with tarfile.open(path, "w") as shard:
        for name in ("0.json", "1.png", "._2.json"):
            add(shard, name, json.dumps(ROWS[2]).encode())
    assert f"no valid JSON (Expecting value at column 1) in row 1 (counted from 0) of {path}" in refusal(
        ChatDataset(path).validate
    )


def test_an_array_is_read_a_part_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("amvl_fast.data.archives.CHUNK", 64)
    rows = [row(user("n" * 10 * n + "é"), assistant(str(n)), images=[]) for n in range(50)]
    path = tmp_path / "rows.json"
    path.write_text("\ufeff" + json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert ChatDataset(path).column("messages") == [each["messages"] for each in rows]


def test_paths_may_hold_what_patterns_are_made_of(folder):
    place = folder / "run[1] *"
    place.mkdir()
    assert len(ChatDataset(write(place, ROWS), image_root=folder)) == len(ROWS)
    assert len(list(ChatStream(place / "rows.jsonl", image_root=folder))) == len(ROWS)


def open_both(cache, sources, ready, found):
    datasets.config.HF_DATASETS_CACHE = cache
    ready.wait()
    for source in sources:
        dataset = ChatDataset(source)
        dataset.validate()
        found.put((len(dataset), dataset[len(dataset) - 1]["answer"]))


def test_processes_may_start_together_on_a_cold_cache(folder):
    write_tar(folder / "rows.tar", folder, ROWS * 100)
    sources = [write(folder, ROWS * 1000), folder / "rows.tar"]
    context = multiprocessing.get_context("fork")
    ready, found = context.Barrier(2), context.Queue()
    arguments = (folder / "cache", sources, ready, found)
    together = [context.Process(target=open_both, args=arguments) for _ in range(2)]
    for process in together:
        process.start()
    assert sorted(found.get(timeout=120) for _ in range(4)) == [(700, "3")] * 2 + [(7000, "3")] * 2
    for process in together:
        process.join()
        assert process.exitcode == 0
