"""Chat data: easy-VQA, and files of the chat form."""

import json
import sys

import easy_vqa as package
import numpy
import pyarrow
import pyarrow.parquet
import pytest
from chat_rows import IMAGE, ROW, assistant, refusal, row, user, write
from PIL import Image

from amvl_fast.data import ChatDataset, write_easy_vqa


@pytest.fixture(scope="module")
def easy_vqa(tmp_path_factory):
    directory = tmp_path_factory.mktemp("easy-vqa")
    return directory, write_easy_vqa(directory)


def test_easy_vqa_is_the_whole_package_with_its_own_split(easy_vqa):
    directory, paths = easy_vqa
    train, test = ChatDataset(paths["train"]), ChatDataset(paths["test"])
    assert (len(train), len(test)) == (38_575, 9_673)
    assert [len(list((directory / "images" / split).iterdir())) for split in paths] == [4_000, 1_000]
    assert sorted(path.name for path in directory.iterdir()) == ["images", "test.jsonl", "train.jsonl"]
    questions, answers, images = package.get_test_questions()
    assert test.answers() == answers
    assert [m[0]["content"][1]["text"] for m in test.column("messages")] == questions
    assert test.column("images") == [[f"images/test/{image}.png"] for image in images]
    with Image.open(package.get_test_image_paths()[images[17]]) as image:
        assert test[17]["images"][0].tobytes() == image.tobytes()


def test_easy_vqa_kinds_follow_question_and_answer(easy_vqa):
    test = ChatDataset(easy_vqa[1]["test"])
    questions = [messages[0]["content"][1]["text"] for messages in test.column("messages")]
    kind = dict(zip(questions, test.column("kind"), strict=True))
    assert kind["what shape is in the image?"] == "which shape"
    assert kind["what is the red shape?"] == "which shape"
    assert kind["what color is the circle?"] == "which colour"
    assert kind["is there a red shape?"] == "yes/no: colour"
    assert kind["is no red shape present?"] == "yes/no: colour, negated"
    assert kind["is there a rectangle?"] == "yes/no: shape"
    assert kind["does the image not contain a circle?"] == "yes/no: shape, negated"
    assert len(set(kind.values())) == 6


def test_easy_vqa_passes_its_own_check(easy_vqa):
    for path in easy_vqa[1].values():
        ChatDataset(path).validate()


def test_easy_vqa_again_touches_nothing_and_an_interrupted_write_is_completed(easy_vqa, monkeypatch):
    directory, paths = easy_vqa
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    assert write_easy_vqa(directory) == paths
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before

    rows = paths["test"].read_bytes()
    paths["test"].unlink()
    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", lambda row: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_easy_vqa(directory)
    assert sorted(path.name for path in directory.iterdir()) == ["images", "train.jsonl"]
    write_easy_vqa(directory)
    assert paths["test"].read_bytes() == rows


def test_missing_packages_name_their_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install amvl-fast[demo]" in refusal(lambda: write_easy_vqa(tmp_path))
    assert "pip install amvl-fast[train]" in refusal(lambda: ChatDataset(write(tmp_path, [ROW])))


ROWS = [
    ROW | {"kind": "one"},
    row(user("green?", IMAGE, IMAGE), assistant("no"), images=["red.png", "blue.png"]) | {"kind": "two"},
    row(user("say it"), assistant("it"), images=[]) | {"kind": None},
]


def items(dataset):
    return [
        {**item, "images": [image.tobytes() for image in item["images"]]}
        for item in (dataset[index] for index in range(len(dataset)))
    ]


def test_jsonl_json_and_parquet_give_the_same_rows(folder):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")
    (folder / "rows.json").write_text(json.dumps(ROWS, indent=1))
    datasets = [ChatDataset(path) for path in (write(folder, ROWS), folder / "rows.json", folder / "rows.parquet")]
    for dataset in datasets:
        dataset.validate()
        assert [dataset[i]["messages"] for i in range(3)] == [each["messages"] for each in ROWS]
        assert [dataset[i]["answer"] for i in range(3)] == dataset.answers() == ["circle", "no", "it"]
        assert dataset.column("kind") == ["one", "two", None]
        assert items(dataset) == items(datasets[0])
    assert [image.size for image in datasets[0][1]["images"]] == [(64, 64), (64, 32)]


def test_content_may_be_a_string_and_images_may_be_absent(folder):
    plain = {"messages": [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "it"}]}
    dataset = ChatDataset(write(folder, [ROW, plain]))
    dataset.validate()
    assert dataset[1] == {"messages": plain["messages"], "images": [], "answer": "it", "row": 1}
    ChatDataset(write(folder, [plain], "plain.jsonl")).validate()


def test_content_and_columns_may_change_far_down_the_file(folder):
    plain = [{"role": "user", "content": "x" * 100_000}, {"role": "assistant", "content": "it"}]
    last = {**ROW, "kind": "late"}
    dataset = ChatDataset(write(folder, [{"messages": plain}] * 110 + [last]))
    assert dataset[0]["answer"] == "it"
    assert (dataset[110]["messages"], dataset[110]["kind"]) == (ROW["messages"], "late")
    assert dataset.column("kind") == [None] * 110 + ["late"]


def test_images_are_rgb_upright_and_relative_to_the_root(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("elsewhere")
    tags = Image.Exif()
    tags[0x0112] = 6  # turned by a quarter
    Image.new("RGBA", (16, 8)).save(root / "red.png", exif=tags)
    image = ChatDataset(write(folder, [ROW]), image_root=root)[0]["images"][0]
    assert (image.mode, image.size) == ("RGB", (8, 16))


@pytest.mark.parametrize(("name", "order"), [("grey.png", "<u2"), ("grey.tiff", "<u2"), ("big.tiff", ">u2")])
def test_images_of_16_bits_keep_their_shades(folder, name, order):
    levels = [0, 100, 257, 32_768, 65_535]
    mode = "I;16B" if order == ">u2" else "I;16"
    Image.frombytes(mode, (5, 1), numpy.array(levels, order).tobytes()).save(folder / name)
    with Image.open(folder / name) as stored:
        assert stored.mode == mode
    dataset = ChatDataset(write(folder, [ROW | {"images": [name]}]))
    dataset.validate()
    image = dataset[0]["images"][0]
    assert (image.mode, image.size) == ("RGB", (5, 1))
    assert numpy.asarray(image)[0].tolist() == [[round(level / 257)] * 3 for level in levels]


def test_subsets_keep_the_row_numbers_of_the_file(folder):
    rows = [row(user("n?"), assistant(str(n)), images=[]) for n in range(50)]
    dataset = ChatDataset(write(folder, rows), max_rows=40)
    assert dataset.answers() == [str(n) for n in range(40)]
    part = dataset.subset(10, seed=3)
    numbers = [part[i]["row"] for i in range(10)]
    assert numbers == sorted(set(numbers))
    assert max(numbers) < 40
    assert part.answers() == [str(n) for n in numbers] == dataset.subset(10, seed=3).answers()
    assert part.answers() != dataset.subset(10, seed=4).answers()
    assert len(dataset.subset(1000)) == len(dataset) == 40
    assert "max_rows is 0" in refusal(lambda: ChatDataset(dataset.path, max_rows=0))
    assert "no column `kind` (it has images, messages)" in refusal(lambda: dataset.column("kind"))
