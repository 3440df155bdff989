"""The tensors that rows become: what is learned, what is padded, and that inference sees the same."""

import copy

import pytest
import torch
from chat_rows import IMAGE, assistant, refusal, row, user, write
from tokenizers.processors import TemplateProcessing

from amvl_fast import tiny
from amvl_fast.data import ChatCollator, ChatDataset

SYSTEM = {"role": "system", "content": "be brief"}
BATCH = [
    row(user(IMAGE, "what shape is it?"), assistant("circle")),
    row(user("or", IMAGE, IMAGE, "?"), assistant("the first one"), images=["green.png", "blue.png"]),
    row(user("say it"), assistant("it"), images=[]),
    row(SYSTEM, user("a"), assistant("b"), user("c"), assistant("d e"), images=[]),
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.build_tokenizer(["what shape is it? circle, the first one", "say it", "be brief"] * 3)


@pytest.fixture
def processor(tokenizer):
    return tiny.build_processor(copy.deepcopy(tokenizer))  # some tests change its special tokens


@pytest.fixture
def rows(folder):
    dataset = ChatDataset(write(folder, BATCH))
    dataset.validate()
    return [dataset[index] for index in range(len(dataset))]


PER_TOKEN = ["input_ids", "attention_mask", "labels", "mm_token_type_ids"]


def unpadded(batch, number):
    kept = batch["attention_mask"][number].bool()
    return {name: batch[name][number][kept].tolist() for name in PER_TOKEN}


def test_labels_are_the_answer_and_its_end_of_turn(processor, rows):
    batch = ChatCollator(processor)(rows)
    assert {name: batch[name].dtype for name in PER_TOKEN} == dict.fromkeys(PER_TOKEN, torch.int64)
    for item, ids, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
        learned = labels != -100
        assert processor.tokenizer.decode(labels[learned]) == item["answer"] + tiny.TURN_END
        assert torch.equal(ids[learned], labels[learned])
    assert not batch["attention_mask"][batch["input_ids"] == processor.tokenizer.pad_token_id].any()


def test_prompt_ids_in_training_are_prompt_ids_at_inference(processor, rows):
    batch = ChatCollator(processor)(rows)
    prompts = ChatCollator(processor)(rows, with_answer=False)
    assert "labels" not in prompts
    assert torch.equal(prompts["pixel_values"], batch["pixel_values"])
    for number, item in enumerate(rows):
        asked = item["messages"][:-1]
        shown = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        ids = processor(text=[shown], images=item["images"] or None)["input_ids"][0]
        length = len(ids)
        whole = unpadded(batch, number)
        assert whole["input_ids"][:length] == ids
        assert whole["labels"][:length] == [-100] * length
        assert -100 not in whole["labels"][length:]
        assert prompts["input_ids"][number, -length:].tolist() == ids
        assert not prompts["attention_mask"][number, :-length].any()


def test_left_padding_equals_right_padding(processor, rows):
    right, left = ChatCollator(processor)(rows), ChatCollator(processor, padding_side="left")(rows)
    assert right["attention_mask"][:, 0].all()
    assert left["attention_mask"][:, -1].all()
    assert not right["attention_mask"].all()
    for number in range(len(rows)):
        assert unpadded(left, number) == unpadded(right, number)
    for batch in (left, right):
        padding = batch["attention_mask"] == 0
        assert (batch["input_ids"][padding] == processor.tokenizer.pad_token_id).all()
        assert (batch["labels"][padding] == -100).all()
        assert not batch["mm_token_type_ids"][padding].any()
    assert torch.equal(left["pixel_values"], right["pixel_values"])


def test_a_ragged_batch_equals_its_rows_one_by_one(processor, rows):
    batch = ChatCollator(processor)(rows)
    alone = [ChatCollator(processor)([item]) for item in rows]
    for number, one in enumerate(alone):
        assert unpadded(batch, number) == unpadded(one, 0)
    for name in ("pixel_values", "image_grid_thw"):
        assert torch.equal(batch[name], torch.cat([one[name] for one in alone if name in one]))


def test_several_images_keep_their_order_and_text_rows_have_none(processor, rows):
    batch = ChatCollator(processor)(rows)
    assert batch["image_grid_thw"].tolist() == [[1, 8, 8], [1, 6, 4], [1, 4, 8]]
    pads = batch["input_ids"] == processor.image_token_id
    assert pads.sum(1).tolist() == [64 // 4, (24 + 32) // 4, 0, 0]
    assert torch.equal(batch["mm_token_type_ids"] == 1, pads)
    assert batch["pixel_values"].shape == (64 + 24 + 32, 3 * 2 * 8 * 8)
    assert "pixel_values" not in ChatCollator(processor)(rows[2:])


def test_rows_without_an_answer_serve_generation_only(processor, rows):
    asked = [{**item, "messages": item["messages"][:-1]} for item in rows]
    collator = ChatCollator(processor)
    assert torch.equal(collator(asked, with_answer=False)["input_ids"], collator(rows, with_answer=False)["input_ids"])
    assert "Row 0 has no answer" in refusal(lambda: collator(asked))


def test_a_turn_that_ends_in_no_special_token_gets_the_end_of_sequence(processor, rows):
    processor.chat_template = processor.chat_template.replace("<|im_end|>", " ")
    labels = ChatCollator(processor)(rows[:1])["labels"][0]
    assert processor.tokenizer.decode(labels[labels != -100]) == "circle" + processor.tokenizer.eos_token


def test_a_beginning_of_sequence_is_not_written_twice(processor, rows):
    tokenizer, begin = processor.tokenizer, processor.tokenizer.convert_tokens_to_ids(tiny.TURN_START)
    tokenizer.bos_token = tiny.TURN_START
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(  # as Llama's and Gemma's tokenizers have
        single=f"{tiny.TURN_START} $A", special_tokens=[(tiny.TURN_START, begin)]
    )
    batch = ChatCollator(processor)(rows)
    for number, item in enumerate(rows):
        ids = unpadded(batch, number)["input_ids"]
        assert ids.count(begin) == len(item["messages"])


def test_an_unusable_template_is_refused(processor, rows):
    template = processor.chat_template
    processor.chat_template = template.replace("<|im_start|>assistant\n{% endif", "ASSISTANT:{% endif")
    assert "chat template is unusable for training" in refusal(lambda: ChatCollator(processor)(rows))


def test_an_image_token_in_the_text_is_refused_with_its_rows(processor, rows):
    rows[2]["messages"][0] = user(f"say {tiny.IMAGE}")
    assert "refused a row among 1, 2 (" in refusal(lambda: ChatCollator(processor)(rows[1:3]))


def test_collator_options_are_checked(processor):
    assert "use 'left' or 'right'" in refusal(lambda: ChatCollator(processor, padding_side="both"))
    processor.tokenizer.pad_token = None
    assert "has no padding token" in refusal(lambda: ChatCollator(processor))
