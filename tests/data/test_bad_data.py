"""Every kind of bad data gets one sentence before training: what, where, what to do."""

import json

import pytest
from chat_rows import IMAGE, ROW, assistant, refusal, row, text, user, write
from PIL import Image

from amvl_fast.data import ChatDataset

QUESTION = user(IMAGE, "what shape is it?")
BAD_ROWS = {
    "no messages": (row(), "There are no messages in"),
    "null messages": ({"messages": None, "images": []}, "There are no messages in"),
    "last is the user": (row(QUESTION), "There is no answer in"),
    "empty answer": (row(QUESTION, assistant(" \n")), "There is no answer in"),
    "no content": (row(QUESTION, {"role": "assistant", "content": None}), "There is no answer in"),
    "image in the answer": (
        row(user("draw"), {"role": "assistant", "content": [text("so"), IMAGE]}),
        "holds an image",
    ),
    "no question": (row(assistant("circle"), images=[]), "There is no question in"),
    "role": (row({"role": "human", "content": "?"}, assistant("it")), "has the role 'human': use one of"),
    "no role": (row({"from": "human", "value": "?"}, assistant("it")), "has the role None"),
    "part": (row(user({"type": "video"}), assistant("it")), "neither text nor image"),
    "content": (row({"role": "user", "content": 3}, assistant("it")), "neither text nor image"),
    "text": (row(user({"type": "text", "text": 3}), assistant("it")), "neither text nor image"),
    "image part missing": (row(user("shape?"), assistant("it")), "0 image parts for 1 image: write one"),
    "image missing": (row(QUESTION, assistant("it"), images=[]), "1 image part for 0 images: write one"),
    "images a string": (ROW | {"images": "red.png"}, "are not a list of paths"),
    "images not paths": (ROW | {"images": [{"bytes": "00"}]}, "are not a list of paths"),
    "answered before": (
        row(user(IMAGE, "shape?"), assistant("Circle"), user("Shape?"), assistant("circle")),
        "already holds the answer 'circle'",
    ),
    "told": (row(user(IMAGE, "shape? Answer: Circle."), assistant("circle")), "already holds"),
    "told by the system": (
        row({"role": "system", "content": "The answer is circle."}, QUESTION, assistant("circle")),
        "already holds the answer 'circle'",
    ),
    "told before": (
        row(user("Answer: circle"), assistant("fine"), QUESTION, assistant("circle")),
        "already holds the answer 'circle'",
    ),
    "told by the assistant": (
        row(user("hm"), assistant("so the answer is: circle"), QUESTION, assistant("circle")),
        "already holds the answer 'circle'",
    ),
    "told as is": (row(user(IMAGE, 'the answer is "circle"'), assistant("circle")), "already holds"),
}


@pytest.mark.parametrize(("bad", "sentence"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named(folder, bad, sentence):
    path = write(folder, [ROW, bad, ROW])
    message = refusal(ChatDataset(path).validate)
    assert sentence in message
    assert f"row 1 (counted from 0) of {path}" in message


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("is it red or blue?", "blue"),
        ("is the answer blue?", "blue"),
        ("is it blue? answer: yes or no", "no"),
        ("what is the answer: is it bluegreen", "green"),
        ("Answer: blue. What else?", "blue"),
        ("answer with one word", "word"),
        ("choose:\nred\nblue", "blue"),
    ],
)
def test_naming_the_answer_is_not_giving_it_away(folder, question, answer):
    ChatDataset(write(folder, [row(user(IMAGE, question), assistant(answer))])).validate()


def test_rows_are_counted_in_the_file(folder):
    rows = [row(user("n?"), assistant("1"), images=[])] * 1500
    dataset = ChatDataset(write(folder, [*rows, row(user("n?"), images=[])]))
    assert "row 1500 (counted from 0)" in refusal(dataset.validate)
    assert "row 1500 (counted from 0)" in refusal(dataset.subset(1501).validate)
    ChatDataset(dataset.path, max_rows=1500).validate()


def test_only_the_rows_of_a_subset_are_checked(folder):
    good, bad = row(user("n?"), assistant("1"), images=[]), row(user("n?"), images=[])
    dataset = ChatDataset(write(folder, [good, bad]))
    parts = {part.answers()[0]: part for part in (dataset.subset(1, seed=seed) for seed in range(10))}
    assert set(parts) == {"1", "n?"}
    parts["1"].validate()
    for call in (parts["n?"].validate, lambda: parts["n?"][0]):
        assert "row 1 (counted from 0)" in refusal(call)


def test_a_bad_image_is_named_with_its_row(folder):
    image = folder / "blue.png"
    blue = ROW | {"images": ["blue.png"]}
    dataset = ChatDataset(write(folder, [ROW, blue, blue]))
    Image.effect_noise((64, 64), 50).save(image)
    dataset.validate()
    where = f"Image {image} of row 1 (counted from 0) of {dataset.path}"

    def validate(decode_images=True):
        dataset.validate(decode_images=decode_images, again=True)

    image.write_bytes(image.read_bytes()[:1000])
    validate(decode_images=False)  # a header does not tell
    for call in (validate, lambda: dataset[1]):
        assert f"{where} cannot be read (image file is truncated" in refusal(call)
    image.write_bytes(b"no image")
    assert f"{where} cannot be read" in refusal(lambda: validate(decode_images=False))
    image.unlink()
    assert f"{where} does not exist: put it there" in refusal(validate)
    assert f"{where} does not exist: put it there" in refusal(lambda: validate(decode_images=False))


def test_each_image_file_is_read_once(folder, monkeypatch):
    dataset = ChatDataset(write(folder, [ROW] * 20 + [ROW | {"images": ["blue.png"]}]))
    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path, **options: opened.append(path.name) or real(path, **options))
    dataset.validate()
    assert sorted(opened) == ["blue.png", "red.png"]


LINE = json.dumps(ROW)
BAD_FILES = {
    "bad line": ("rows.jsonl", f"{LINE}\n\n{LINE[:-1]}\n", "line 3 (counted from 1) of {}: write"),
    "bad start": (
        "rows.jsonl",
        f"nonsense\n{LINE}\n",
        "There is no valid JSON (Expecting value at column 1) in",
    ),
    "list": ("rows.jsonl", f"{LINE}\n[{LINE}]\n", "There is no JSON object in line 2 (counted from 1) of {}: write"),
    "bad row of an array": ("rows.json", f"[{LINE}, 3]", "There is no JSON object in row 1 (counted from 0) of {}:"),
    "empty": ("rows.jsonl", "", "{} is empty: write at least one row"),
    "blank": ("rows.jsonl", "\n \n", "{} is empty: write at least one row"),
    "empty array": ("rows.json", " [ ]", "{} is empty: write at least one row"),
    "broken array": ("rows.json", f"[{LINE},", "{} cannot be read (its JSON array is broken: "),
    "not Parquet": ("rows.parquet", LINE, "{} cannot be read ("),
    "no messages": ("rows.jsonl", '{"turns": []}', "neither a column `messages` nor `data` in {} (it has turns)"),
    "suffix": ("rows.csv", "a,b\n1,2\n", "{} is not of a known kind: use a file ending in .jsonl"),
}


@pytest.mark.parametrize(("name", "content", "sentence"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_named(tmp_path, name, content, sentence):
    path = tmp_path / name
    path.write_text(content)
    assert sentence.format(path) in refusal(lambda: ChatDataset(path).validate())


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert refusal(lambda: ChatDataset(path)).startswith(f"{path} does not exist:")


def test_two_questions_may_have_the_same_answer(folder):
    chat = row(user(IMAGE, "is it red?"), assistant("yes"), user("is it round?"), assistant("yes"))
    ChatDataset(write(folder, [chat])).validate()


@pytest.mark.parametrize("number", range(3))
def test_a_special_token_in_the_text_is_named(folder, number):
    messages = [{"role": "system", "content": "be brief"}, QUESTION, assistant("circle")]
    told = ["be <|im_end|> brief", [IMAGE, text("what <|im_end|>?")], [text("circle<|im_end|>")]]
    messages[number] = {**messages[number], "content": told[number]}
    dataset = ChatDataset(write(folder, [ROW, row(*messages), ROW]))
    dataset.validate()
    dataset.validate(special_tokens=["<|im_start|>"])
    message = refusal(lambda: dataset.validate(special_tokens=["<|im_start|>", "<|im_end|>"]))
    assert f"row 1 (counted from 0) of {dataset.path} holds the special token '<|im_end|>'" in message


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_unknown_range_are_refused(folder, mode):
    Image.new(mode, (8, 8), 1).save(folder / "deep.tiff")
    dataset = ChatDataset(write(folder, [ROW | {"images": ["deep.tiff"]}]))
    for call in (dataset.validate, lambda: dataset.validate(decode_images=False), lambda: dataset[0]):
        assert f"its pixel mode is '{mode}'; save it with 8 or 16 bits a channel" in refusal(call)
