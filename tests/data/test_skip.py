"""Bad samples that are left out: named once, counted, and too many stop the run."""

import functools
import json
import os

import torch
from chat_rows import IMAGE, ROW, assistant, failure, refusal, row, user, write
from torch.utils.data import DataLoader

from amvl_fast.data import ChatDataset, ChatStream, sentence
from amvl_fast.errors import AMVLError

GOOD = [row(user("n?"), assistant(str(n)), images=[]) for n in range(20)]
BAD = {
    "form": row(user("n?"), images=[]),
    "image": row(user(IMAGE, "n?"), assistant("it"), images=["missing.png"]),
    "url": row(user(IMAGE, "n?"), assistant("it"), images=["http://127.0.0.1/"]),
    "token": row(user("<|end|>?"), assistant("it"), images=[]),
    "columns": {"text": "it"},
}


def rows_with(bad):
    return [bad.get(n, good) for n, good in enumerate(GOOD)]


def opened(folder, bad, **options):
    options = {
        "max_bad_share": 0.5,
        "skipped_file": folder / "run" / "skipped.jsonl",
        "special_tokens": ["<|end|>"],
    } | options
    return ChatDataset(write(folder, rows_with(bad)), on_bad_sample="skip", **options)


def named(folder):
    return [json.loads(line) for line in (folder / "run" / "skipped.jsonl").read_text().splitlines()]


def test_the_next_readable_row_takes_the_place_whatever_was_read_before(folder):
    dataset = opened(folder, dict(zip((2, 5, 6, 18, 19), BAD.values(), strict=True)))
    dataset.validate()
    expected = [{2: 3, 5: 7, 6: 7, 18: 0, 19: 0}.get(n, n) for n in range(20)]
    for order in (range(20), reversed(range(20)), [19, 5, 5]):
        for n in order:
            assert (dataset[n]["answer"], dataset[n]["row"]) == (str(expected[n]), expected[n])
    assert dataset.skipped == 5
    entries = {entry["row"]: entry for entry in named(folder)}
    assert len(named(folder)) == len(entries) == 5
    assert {entry["source"] for entry in entries.values()} == {str(dataset.path)}
    reasons = ["no answer", "does not exist", "is a URL", "special token", "neither a column"]
    assert all(reason in entries[n]["reason"] for n, reason in zip((2, 5, 6, 18, 19), reasons, strict=True))


def test_a_broken_line_is_a_bad_sample(folder):
    path = folder / "rows.jsonl"
    lines = [json.dumps(each) for each in GOOD]
    path.write_text("\n".join(["not JSON", "", *lines[1:19], lines[19][:30]]))
    dataset = ChatDataset(path, on_bad_sample="skip", max_bad_share=0.1)
    assert [dataset[n]["row"] for n in (0, 19)] == [1, 1]
    assert dataset.skipped == 2


def test_more_than_the_share_stop_the_run(folder):
    bad = {n: BAD["image"] for n in (3, 4, 5)}
    assert opened(folder, bad, max_bad_share=0.15, skipped_file=None)[3]["row"] == 6
    dataset = opened(folder, bad, max_bad_share=0.14, skipped_file=None)
    for n in (3, 5):  # and goes on stopping it
        message = refusal(functools.partial(dataset.__getitem__, n))
        assert "3 of 20 samples are bad (15.00%, max_bad_share is 14.00%; no skipped_file" in message
    one = opened(folder, {3: BAD["image"]}, max_bad_share=0.0)
    assert one[3]["row"] == 4
    message = refusal(lambda: opened(folder, bad, max_bad_share=0.14)[4])
    assert f"{folder / 'run' / 'skipped.jsonl'} names them" in message


def test_what_another_process_or_an_earlier_run_named_counts_and_is_not_named_again(folder):
    first = opened(folder, {n: BAD["form"] for n in (1, 2, 3)})
    second = opened(folder, {n: BAD["form"] for n in (1, 2, 3)}, max_bad_share=0.1)
    first[1]
    with (folder / "run" / "skipped.jsonl").open("a") as file:
        file.write('cut off\n{"row": 1, "source": "another.jsonl", "reason": "?"}\n')
    assert (first.skipped, second.skipped) == (3, 3)
    before = (folder / "run" / "skipped.jsonl").read_text()
    assert "3 of 20 samples are bad" in refusal(lambda: second[1])
    assert (folder / "run" / "skipped.jsonl").read_text() == before
    assert opened(folder, {}).skipped == 3


def test_a_subset_counts_with_the_whole(folder):
    dataset = opened(folder, {n: BAD["form"] for n in range(0, 20, 4)}, max_bad_share=0.2, skipped_file=None)
    part = dataset.subset(19, seed=1)
    assert "5 of 20 samples" in refusal(lambda: [part[n] for n in range(19)])
    assert dataset.skipped == part.skipped == 5


def test_workers_count_together(folder):
    bad = {n: BAD["image"] for n in (3, 4, 12, 13)}
    dataset = opened(folder, bad, max_bad_share=0.2)
    for _ in range(2):  # new workers find the same rows, which count once
        rows = [item["row"] for item in DataLoader(dataset, batch_size=None, num_workers=2)]
        assert rows == [{3: 5, 4: 5, 12: 14, 13: 14}.get(n, n) for n in range(20)]
    assert dataset.skipped == 4
    assert {entry["row"] for entry in named(folder)} == {3, 4, 12, 13}
    dataset = opened(folder, bad, max_bad_share=0.15, skipped_file=None)  # of which each worker finds two
    loader = DataLoader(dataset, batch_size=2, num_workers=2, sampler=[3, 4, 12, 13, *range(14, 20)], collate_fn=list)
    error = failure(lambda: list(loader))
    assert str(error).startswith("Caught AMVLError in DataLoader worker process")
    assert sentence(error) == refusal(lambda: dataset[3])
    assert sentence(error).startswith("4 of 20 samples are bad (20.00%, max_bad_share is 15.00%")


def test_an_error_of_a_worker_is_its_sentence_again(folder):
    dataset = ChatDataset(write(folder, [ROW, BAD["image"]]))
    error = failure(lambda: list(DataLoader(dataset, batch_size=None, num_workers=1)))
    assert "\n" in str(error)
    assert sentence(error) == refusal(lambda: dataset[1])
    assert sentence(AMVLError("Said at once: do it.")) == "Said at once: do it."


def test_options_are_checked(folder):
    path = write(folder, GOOD)
    wrong = [
        ({"on_bad_sample": "ignore"}, "on_bad_sample is 'ignore': use one of error, skip"),
        ({"max_bad_share": 2}, "max_bad_share is 2: use a share from 0 to 1"),
        ({"on_bad_sample": "skip", "skipped_file": folder}, f"The skipped_file {folder} cannot be used ("),
    ]
    for kind in (ChatDataset, ChatStream):
        for options, message in wrong:
            assert message in refusal(functools.partial(kind, path, **options))


def test_without_skip_a_bad_row_stops_the_run_and_nothing_is_written(folder):
    path = write(folder, rows_with({2: BAD["token"]}))
    dataset = ChatDataset(path, special_tokens=["<|end|>"], skipped_file=folder / "skipped.jsonl")
    assert "special token" in refusal(dataset.validate)
    assert "special token" in refusal(lambda: dataset[2])
    assert dataset.skipped == 0
    assert not (folder / "skipped.jsonl").exists()


def test_lines_of_many_processes_are_whole(tmp_path):
    from amvl_fast.data.skipped import SkippedFile

    path = tmp_path / "skipped.jsonl"
    children = []
    for child in range(4):
        if (process := os.fork()) == 0:
            file = SkippedFile(path)
            for n in range(100):
                file.add(f"rows-{child}.jsonl", n, "x" * 500)
            os._exit(0)
        children.append(process)
    assert all(os.waitpid(process, 0)[1] == 0 for process in children)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert {(entry["source"], entry["row"]) for entry in entries} == {
        (f"rows-{c}.jsonl", n) for c in range(4) for n in range(100)
    }
    assert len(entries) == len(SkippedFile(path).named) == 400


def test_counts_are_shared_with_spawned_workers_too(folder):
    dataset = opened(folder, {3: BAD["image"]}, skipped_file=None)
    assert dataset._is_bad.is_shared()
    assert isinstance(dataset._is_bad, torch.Tensor)
