"""Streams: every process and worker its own batches, the same for any number of workers."""

import json

import pytest
from chat_rows import IMAGE, assistant, failure, refusal, row, user, write
from torch.utils.data import DataLoader

from amvl_fast.data import ChatDataset, ChatStream, reader, sentence

COUNT = 23
ROWS = [row(user(IMAGE, f"{n}?"), assistant(f"it is {n}"), images=["red.png"]) for n in range(COUNT)]
MISSING = row(user(IMAGE, "n?"), assistant("it"), images=["missing.png"])


def batches(stream, workers=0):
    """The row numbers of each batch that a DataLoader gives."""
    loader = DataLoader(
        stream, batch_size=stream.batch_size, num_workers=workers, collate_fn=lambda items: [i["row"] for i in items]
    )
    return list(loader)


def dealt(rows, batch_size, rank, world_size):
    every = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return every[rank::world_size]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (4, 2), (3, 3)])
def test_each_process_gets_its_batches_in_order_for_any_number_of_workers(folder, workers, batch_size, world_size):
    path = write(folder, ROWS)
    for rank in range(world_size):
        stream = ChatStream(path, batch_size=batch_size, rank=rank, world_size=world_size)
        assert batches(stream, workers) == dealt(list(range(COUNT)), batch_size, rank, world_size)


def test_several_files_are_not_dealt_out_by_the_library(folder):
    paths = [write(folder, ROWS[n::3], f"part-{n}.jsonl") for n in range(3)]
    (folder / "parts").mkdir()
    for path in paths:
        path.rename(folder / "parts" / path.name)
    stream = ChatStream(folder / "parts", image_root=folder, batch_size=2)
    assert batches(stream, 2) == dealt(list(range(COUNT)), 2, 0, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_other_processes_are_not_decoded(folder, workers, monkeypatch):
    log = folder / "read.txt"

    def read(self, image, where, **options):
        with log.open("a") as file:
            file.write(where.split()[1] + "\n")
        return real(self, image, where, **options)

    real = reader.Reader.image
    monkeypatch.setattr(reader.Reader, "image", read)
    batches(ChatStream(write(folder, ROWS), batch_size=3, rank=1, world_size=2), workers)
    assert sorted(map(int, log.read_text().split())) == sum(dealt(list(range(COUNT)), 3, 1, 2), [])


def test_the_order_is_shuffled_anew_each_epoch_and_known_to_workers_that_live_on(folder):
    path = write(folder, ROWS)
    ranks = [ChatStream(path, batch_size=2, rank=rank, world_size=2, seed=5, buffer_size=10) for rank in range(2)]
    orders = []
    for epoch in range(3):
        for stream in ranks:
            stream.set_epoch(epoch)
        parts = [batches(stream) for stream in ranks]
        assert parts[0] == batches(ranks[0], 2)
        order = [part.pop(0) for _ in range(6) for part in parts if part]
        orders.append(sum(order, []))
        assert sorted(orders[-1]) == list(range(COUNT)) != orders[-1]
    assert len({tuple(order) for order in orders}) == 3
    ranks[0].set_epoch(0)
    loader = DataLoader(ranks[0], batch_size=2, num_workers=1, persistent_workers=True, collate_fn=list)
    seen = []
    for epoch in (0, 1):
        ranks[0].set_epoch(epoch)
        seen.append([item["row"] for items in loader for item in items])
    assert seen == [sum(dealt(order, 2, 0, 2), []) for order in orders[:2]]
    other = ChatStream(path, seed=6, buffer_size=10)
    assert [item["row"] for item in other] != [item["row"] for item in ChatStream(path, seed=5, buffer_size=10)]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_next_readable_row_of_the_process_takes_the_place_of_a_bad_one(folder, workers):
    bad = {4, 5, 8, 9, 16, 22}  # batches 2, 4 and 8 are whole or half gone
    path = write(folder, [MISSING if n in bad else each for n, each in enumerate(ROWS)])
    options = {"batch_size": 2, "world_size": 2, "on_bad_sample": "skip", "skipped_file": folder / "skipped.jsonl"}
    stream = ChatStream(path, rank=0, **options)  # rows 0 1  4 5  8 9  12 13  16 17  20 21
    assert batches(stream, workers) == [[0, 1], [12, 12], [12, 12], [12, 13], [17, 17], [20, 21]]
    assert stream.skipped == 5
    stream = ChatStream(path, rank=1, **options)  # rows 2 3  6 7  10 11  14 15  18 19  22
    assert batches(stream, workers) == [[2, 3], [6, 7], [10, 11], [14, 15], [18, 19]]
    entries = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert sorted(entry["row"] for entry in entries) == sorted(bad)
    assert {entry["source"] for entry in entries} == {str(path)}


@pytest.mark.parametrize("workers", [0, 2])
def test_more_bad_rows_than_the_share_stop_the_stream(folder, workers):
    rows = [MISSING if n % 3 == 0 else ROWS[0] for n in range(60)]  # 20 bad ones
    path = write(folder, rows)
    options = {"batch_size": 2, "on_bad_sample": "skip", "skipped_file": folder / "skipped.jsonl"}
    fine = ChatStream(path, max_bad_share=0.5, **options)
    assert sum(map(len, batches(fine, workers))) == 60
    assert fine.skipped == 20
    error = failure(lambda: batches(ChatStream(path, max_bad_share=0.3, **options), workers))
    assert int(sentence(error).split()[0]) in ((11,) if not workers else (11, 12, 13))  # both may have gone on
    assert f"max_bad_share is 30.00%; {folder / 'skipped.jsonl'} names them" in sentence(error)
    few = ChatStream(write(folder, rows[:30], "few.jsonl"), max_bad_share=0.0, **options)  # ten are always allowed
    assert sum(map(len, batches(few, workers))) == 30


def test_a_bad_row_stops_the_stream_without_skip(folder):
    path = write(folder, [*ROWS[:3], MISSING])
    stream = ChatStream(path)
    stream.validate()
    message = refusal(lambda: list(stream))
    assert "missing.png of row 3 (counted from 0)" in message
    assert sentence(failure(lambda: batches(stream, 1))) == message
    stream = ChatStream(write(folder, ROWS))
    stream.validate(special_tokens=["7?"])
    assert "row 7 (counted from 0)" in refusal(lambda: list(stream))


def test_lines_are_numbered_as_in_the_dataset(folder):
    path = folder / "rows.jsonl"
    path.write_text("\n\n".join(map(json.dumps, ROWS)) + "\n \n")
    assert len(list(ChatStream(path))) == len(ChatDataset(path)) == COUNT
    dataset = ChatDataset(path)
    assert [item["row"] for item in ChatStream(path)] == list(range(len(dataset)))
    assert [item["answer"] for item in ChatStream(path, max_rows=5)] == dataset.answers()[:5]


def test_options_are_checked(folder):
    path = write(folder, ROWS)
    for name in ("batch_size", "world_size", "buffer_size", "max_rows"):
        assert f"{name} is 0: use at least 1" in refusal(lambda name=name: ChatStream(path, **{name: 0}))
    message = refusal(lambda: ChatStream(path, rank=2, world_size=2))
    assert "rank is 2: use a number from 0 to world_size - 1, 1" in message
    path.write_text('{"turns": []}\n')
    assert "neither a column `messages` nor `data`" in refusal(ChatStream(path).validate)
    path.write_text("\n")
    assert f"{path} is empty" in refusal(ChatStream(path).validate)
