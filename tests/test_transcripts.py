"""Texts that are message lists or transcripts as a whole are read; all others stay texts."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
from conftest import PAIR, ROOT, USER
from hypothesis import given
from hypothesis import strategies as st

from reward_pipeline.schemas import checked_pairs
from reward_pipeline.sources import BadRow, Row
from reward_pipeline.transcripts import (
    TRANSCRIPTS,
    answered_turns,
    asked_turns,
    listed_messages,
    read_transcripts,
    transcript,
    without_end,
)

ANSWER = {"role": "assistant", "content": "It's \"red\".\nOr { 'blue' }\n{ 1 }, array(2), dtype=x"}
LIST = [{"role": "user", "content": "[0. 1.] 'a' 'b'"}, ANSWER, {"role": "user", "content": None}]


def outcome(row):
    ((_, pair, reason),) = checked_pairs([Row("row 1", row)])
    return pair or reason


# --- lists as text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(LIST),
        json.dumps(LIST, indent=2),
        " \n" + json.dumps(LIST, indent="\t") + "\n",
        repr(LIST),
        str(np.array(LIST, dtype=object)),  # as pandas writes what `datasets` hands it
        str({name: np.array([each[name] for each in LIST], dtype=object) for name in ("role", "content")}),
    ],
    ids=["JSON", "lines of JSON", "tabs", "Python", "NumPy", "struct of arrays"],
)
def test_message_lists_written_as_text_are_lists(text):
    assert listed_messages(text) == LIST


def test_pandas_and_its_files_are_read_back(tmp_path):
    table = pd.DataFrame({"chosen": [np.array(LIST, dtype=object)], "rejected": [LIST]})
    table.to_csv(tmp_path / "a.csv")
    read = pd.read_csv(tmp_path / "a.csv").iloc[0]
    assert listed_messages(read["chosen"]) == listed_messages(read["rejected"]) == LIST


@given(contents=st.lists(st.text(st.sampled_from("'\"\\{} \n[]a0,:()") | st.characters(), max_size=12), min_size=1))
def test_any_content_survives_being_printed(contents):
    messages = [{"role": "user", "content": content} for content in contents]
    for text in (repr(messages), str(np.array(messages, dtype=object)), json.dumps(messages)):
        if len(messages) < 1000:  # NumPy leaves out the middle of longer ones
            assert listed_messages(text) == messages


@pytest.mark.parametrize("value", [LIST, {"role": ["user"], "content": ["x"]}, {"role": "user", "content": "x"}])
def test_structs_of_lists_and_single_messages_are_lists(value):
    expected = LIST if value is LIST else [{"role": "user", "content": "x"}]
    assert listed_messages(value) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "[", "[{", "[1, 2]", "{}", "[INST] role: content: [/INST]", "the 'role': and 'content': of it"),
        '[{"name": "Bob", "role": "admin"}]',
        '[{"role": "user", "content": "x"}, 1]',
        'Use [{"role": "user", "content": "x"}].',
        None,
        5,
    ],
)
def test_other_texts_stay(text):
    assert listed_messages(text) == text


@pytest.mark.parametrize(
    "text",
    [
        '[{"role": "user", "content": }]',
        "[{'role': 'user', 'content': open('x')}]",
        "[{'role': 'user', 'content': 'x'}\n ...\n {'role': 'user', 'content': 'y'}]",
        "[{'role': 'user', 'content': " + "[" * 100_000 + "]" * 100_000 + "}]",
        "[{'role': 'user', 'content': '" + "x" * 1_000_000 + "'}]",
        '[{"role": "assistant", "content": "cut o',
    ],
    ids=["JSON", "code", "cut by NumPy", "deep", "long", "cut off"],
)
def test_lists_that_can_not_be_read_are_dropped_with_that_reason(text):
    with pytest.raises(BadRow, match="message list in a text can not be read"):
        listed_messages(text)
    assert outcome({**PAIR, "chosen": text}) == "message list in a text can not be read"


def test_escapes_that_python_does_not_know_are_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (message,) = listed_messages(r"[{'role': 'user', 'content': '\d'}]")
    assert message["content"] == r"\d"


# --- transcripts -----------------------------------------------------------------------------------------------------

RULES = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}, USER,
]  # fmt: skip
WRITTEN = {
    "ChatML": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    "Hello!<|im_end|>\n<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n",
    "Llama 3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "Hello!<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nName a colour.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "Gemma": "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
    "<start_of_turn>user\nName a colour.<end_of_turn>\n<start_of_turn>model\n",
    "Zephyr, Phi": "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello!</s>\n<|user|>\n"
    "Name a colour.</s>\n<|assistant|>\n",
    "Llama 2, Mistral": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello! </s><s>[INST] Name a colour. "
    "[/INST]",
    "hh-rlhf": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Name a colour.\n\nAssistant:",
    "Guanaco": "### Human: Hi\n### Assistant: Hello!\n### Human: Name a colour.\n### Assistant:",
    "Alpaca": "### Instruction:\nHi\n\n### Response:\nHello!\n\n### Instruction:\nName a colour.\n\n### Response:\n",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_prompt_that_is_a_transcript_becomes_its_turns(name):
    text = WRITTEN[name]
    turns = [RULES, *TURNS] if "Be brief." in text else TURNS
    assert asked_turns(text) == turns
    assert answered_turns(text) is None
    pair = outcome({"prompt": text, "chosen": " Red.<|im_end|>", "rejected": "Seven. </s>"})
    assert pair["prompt"] == turns
    assert [pair[side][0]["content"].strip() for side in ("chosen", "rejected")] == ["Red.", "Seven."]
    for prompt in (text, turns, text.removesuffix("\n"), ...):  # answers that repeat it, without a prompt as well
        whole = {"chosen": f"{text} Red.</s>", "rejected": f"{text}Seven."}
        pair = outcome(whole if prompt is ... else {"prompt": prompt, **whole})
        assert pair["prompt"] == turns
        assert [pair[side][0]["content"] for side in ("chosen", "rejected")] == ["Red.", "Seven."]


def test_all_transcripts_are_tried_and_listed():
    assert {form.name for form in TRANSCRIPTS} == WRITTEN.keys()
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert all(f"- {name}: " in page for name in WRITTEN)


@pytest.mark.parametrize(
    "text, contents",
    [
        ("Human: a\nb\nAssistant: c\nHuman: d\nAssistant:", ["a\nb", "c", "d"]),
        ("Human: a\nAssistant: b\n\nHuman: c\nAssistant:", ["a", "b", "c"]),
        ("USER: a\nASSISTANT:", ["a"]),
        ("System: a\n\nHuman: b\n\nAssistant:", ["a", "b"]),
        (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nShorten.\n\n### Input:\nA red car.\n\n### Response:",
            ["Shorten.\nA red car."],
        ),
        ("<|im_start|>user\na<|im_end|>\n<|im_start|>tool\nb<|im_end|>\n", ["a", "b"]),
    ],
)
def test_variants_of_transcripts(text, contents):
    found = asked_turns(text)
    assert found and [turn["content"] for turn in found] == contents


@pytest.mark.parametrize(
    "text",
    [
        *("", "Name a colour.", "What does Human: mean?", "What is <|im_start|>user\n?", "Assistant: a", "Human:"),
        "Human: a\n\nAssistant: b",  # what follows is no answer to it
        "Human: a\n\nHuman: b\n\nAssistant:",
        "System: You say hello.\nUser: What do you think?",  # people write such prompts
        "Please correct this.\n\n### Instruction:\na\n\n### Response:",
        "<|im_start|>poet\na<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n",
    ],
)
def test_other_prompts_are_text(text):
    assert asked_turns(text) is None
    row = {"prompt": text, "chosen": "a", "rejected": "b"}
    assert read_transcripts(row) == row


@pytest.mark.parametrize(
    "chosen, rejected, expected",
    [
        ("Name a colour. Red.", "Name a colour.\nSeven.", ["Red.", "Seven."]),
        (
            "\n\nHuman: Name a colour.\n\nAssistant: Red.",
            "Human: Name a colour.\nAssistant: Seven.",
            ["Red.", "Seven."],
        ),
        ("Assistant: Red.", "Assistant: Seven.", ["Red.", "Seven."]),
        ("Red.<|im_end|>\n", "Seven. <|im_end|><|endoftext|>", ["Red.", "Seven."]),
        # Of one side alone, or of another prompt, it may be the answer itself.
        ("Name a colour. Red.", "Seven.", None),
        ("Name a colour.", "Name a colour. Seven.", None),
        ("Name a colour.ful thing", "Name a colour.", None),
        ("Human: Name a colour.\n\nAssistant: Red.", "Seven.", None),
        ("Human: Hi\n\nAssistant: Red.", "Human: Hi\n\nAssistant: Seven.", None),
        ("Red.</s>", "Seven.", None),
    ],
)
def test_answers_lose_the_prompt_where_both_repeat_it(chosen, rejected, expected):
    pair = outcome({**PAIR, "chosen": chosen, "rejected": rejected})
    assert pair["prompt"] == [USER]
    found = [pair[side][0]["content"] for side in ("chosen", "rejected")]
    assert [text.strip() for text in found] == expected if expected else found == [chosen, rejected]


def test_lists_tell_whether_a_prompt_is_one_text():
    for text in (WRITTEN["ChatML"], WRITTEN["hh-rlhf"]):
        answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
        repeated = {side: [{"role": "user", "content": text.strip()}, *answer] for side, answer in answers.items()}
        assert outcome({"prompt": text, **repeated})["prompt"] == [{"role": "user", "content": text.strip()}]
        turns = asked_turns(text)
        assert outcome({"prompt": text, **answers})["prompt"] == turns
        read = {side: [*turns, *answer] for side, answer in answers.items()}
        assert outcome({"prompt": text, **read})["prompt"] == turns


def test_short_prompts_may_be_repeated_by_chance():
    for prompt in ("Hello", "Good morning to you"):
        row = {"prompt": prompt, "chosen": f"{prompt}! How are you?", "rejected": f"{prompt} too."}
        assert read_transcripts(row) == row


def test_the_ends_of_turns_go_and_nothing_else():
    texts = {"a <|im_end|>\n": "a", "a</s> <s> ": "a", " a ": " a ", "a</s>b": "a</s>b", "</s>": "", "": ""}
    assert {text: without_end(text) for text in texts} == texts
    assert without_end("a" + " </s>" * 100_000) == "a"


@given(st.lists(st.sampled_from(["<|im_start|>", "user\n", "[INST]", "[/INST]", "Human:", "\n", " ", "a", "</s>"])))
def test_any_text_is_a_transcript_or_not(pieces):
    if found := transcript("".join(pieces)):
        turns = found[1]
        assert {turn["role"] for turn in turns} <= {"system", "user", "assistant", "tool"}
        assert all(turn["content"] for turn in turns[:-1])
    assert without_end("".join(pieces)) in "".join(pieces)
