"""Records in the shape of Monet-SFT-125K as chat rows."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from chat_rows import refusal, write

from amvl_fast.data import ChatDataset, ChatStream
from amvl_fast.data.monet import PLACEHOLDER, monet_row


def turn(role, *content):
    parts = [
        {"type": "image", "image": part[1:]} if part.startswith("@") else {"type": "text", "text": part}
        for part in content
    ]
    return {"role": role, "content": parts}


SYSTEM = turn("system", "Put your answer in a box.")
ASKED = turn("user", "@red.png", "Which is bigger?", "@blue.png")
THOUGHT = turn(
    "assistant",
    "Look at it.<abs_vis_token></abs_vis_token>",
    "@helper.png",  # which does not exist
    "<observation>It is 64 wide.</observation> So ",
    "\\boxed{red}",
)
RECORD = {"metadata": {"dataset_name": "ReFocus", "sample_id": 7}, "data": [SYSTEM, ASKED, THOUGHT]}
ANSWERS = {
    "drop": "Look at it.It is 64 wide. So \\boxed{red}",
    "text": f"Look at it.{PLACEHOLDER}It is 64 wide. So \\boxed{{red}}",
}


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("visual_thoughts", ["drop", "text"])
def test_records_become_rows(folder, form, visual_thoughts):
    path = folder / f"records.{form}"
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([RECORD] * 3), path)
    elif form == "json":
        path.write_text(json.dumps([RECORD] * 3))
    else:
        write(folder, [RECORD] * 3, path.name)
    dataset = ChatDataset(path, visual_thoughts=visual_thoughts)
    dataset.validate(special_tokens=["<abs_vis_token>", "<observation>"])
    stream = ChatStream(path, visual_thoughts=visual_thoughts)
    for item in (dataset[2], list(stream)[2]):
        assert item["answer"] == ANSWERS[visual_thoughts]
        assert [message["role"] for message in item["messages"]] == ["system", "user", "assistant"]
        question = {"type": "text", "text": "Which is bigger?"}
        assert item["messages"][1]["content"] == [{"type": "image"}, question, {"type": "image"}]
        assert [image.size for image in item["images"]] == [(64, 64), (64, 32)]
        assert (item["metadata"], item["row"]) == (RECORD["metadata"], 2)
        assert "data" not in item
    assert dataset.answers() == [ANSWERS[visual_thoughts]] * 3
    assert dataset.column("metadata") == [RECORD["metadata"]] * 3


def test_assistant_turns_before_another_are_thoughts():
    turns = [ASKED, turn("assistant", "@helper.png", "Hm."), turn("assistant", "@helper.png"), turn("assistant", "red")]
    dropped, kept = (monet_row({"data": turns}, how)["messages"] for how in ("drop", "text"))
    assert [message["role"] for message in dropped] == ["user", "assistant"]
    texts = ["".join(part["text"] for part in message["content"]) for message in kept[1:]]
    assert texts == [PLACEHOLDER + "Hm.", PLACEHOLDER, "red"]


def test_an_earlier_dialogue_stays():
    turns = [turn("user", "hi"), turn("assistant", "hello"), ASKED, turn("assistant", "red")]
    row = monet_row({"data": turns})
    assert [message["role"] for message in row["messages"]] == ["user", "assistant", "user", "assistant"]
    assert row["images"] == ["red.png", "blue.png"]


def test_words_inside_the_marks_of_a_thought_are_kept_as_text_only():
    turns = [turn("user", "?"), turn("assistant", "so <abs_vis_token>a crop\n</abs_vis_token>it is </observation>red")]
    answers = [monet_row({"data": turns}, how)["messages"][-1]["content"][0]["text"] for how in ("drop", "text")]
    assert answers == ["so it is red", "so a crop\nit is red"]


def test_marks_in_a_question_are_the_users_own_words():
    turns = [turn("user", "what is <observation>?"), turn("assistant", "a mark")]
    assert monet_row({"data": turns})["messages"][0] == turns[0]


def test_an_answer_of_helper_images_alone_is_no_answer(folder):
    record = RECORD | {"data": [ASKED, turn("assistant", "@helper.png")]}
    assert "There is no answer in row 0" in refusal(ChatDataset(write(folder, [record])).validate)
    ChatDataset(write(folder, [record], "text.jsonl"), visual_thoughts="text").validate()


@pytest.mark.parametrize(
    "data", ["text", [3], [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": [3]}]]
)
def test_a_record_of_another_form_is_named(folder, data):
    path = write(folder, [RECORD, RECORD | {"data": data}])
    message = refusal(ChatDataset(path).validate)
    assert f"The `data` of row 1 (counted from 0) of {path} is not a list of turns: write" in message


def test_visual_thoughts_are_dropped_or_text(folder):
    assert "use one of drop, text" in refusal(lambda: ChatDataset(write(folder, [RECORD]), visual_thoughts="keep"))
