import copy

import numpy as np
import pytest
from datasets import Dataset

from reward_pipeline import pairs
from reward_pipeline.files import InputError
from reward_pipeline.schemas import check_pair
from reward_pipeline.sources import open_source

PAIR = {"prompt": "Name a colour.", "chosen": "Red.", "rejected": "Seven."}


def test_duplicates_and_contradictions():
    key = np.array([7, 1, 7, 2, 2, 3, 3, 3])
    swapped = np.array([0, 0, 0, 0, 1, 1, 1, 1], dtype=bool)
    kept, duplicates, contradicting = pairs.unique_pairs(key, swapped)
    assert kept.tolist() == [0, 1, 5]  # 7 twice, 2 against itself, 3 three times the same
    assert (duplicates.tolist(), contradicting.tolist()) == ([2, 6, 7], [3, 4])


def test_keys_tell_equal_from_swapped_pairs():
    pair = check_pair(PAIR)
    swapped = {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}
    spaced = {**pair, "chosen": f" {PAIR['chosen']}\n"}  # as text: the form of an answer makes no difference
    one, other, same = (pairs.pair_keys(each) for each in (pair, swapped, spaced))
    assert one == same
    assert one["pair_key"] == other["pair_key"] and one["swapped"] != other["swapped"]
    assert pairs.pair_keys({**pair, "chosen": "Blue."})["pair_key"] != one["pair_key"]


def test_split_sizes_of_the_hub_dataset():
    train, validation = pairs.split_by_prompt(np.arange(8678), 0.2, 42)
    assert (len(train), len(validation)) == (6942, 1736)
    assert sorted([*train, *validation]) == list(range(8678))


def test_no_prompt_on_both_sides():
    prompts = np.random.default_rng(0).integers(0, 60, size=300)
    train, validation = pairs.split_by_prompt(prompts, 0.2, 42)
    assert not set(prompts[train]) & set(prompts[validation])
    assert abs(len(validation) - 60) <= 3
    again = pairs.split_by_prompt(prompts, 0.2, 42)
    assert np.array_equal(again[1], validation)
    assert not np.array_equal(pairs.split_by_prompt(prompts, 0.2, 43)[1], validation)


def test_two_prompts_are_enough_and_one_is_not():
    train, validation = pairs.split_by_prompt(np.array([5, 5, 5, 9]), 0.2, 0)
    assert (train.tolist(), validation.tolist()) == ([0, 1, 2], [3])
    train, validation = pairs.split_by_prompt(np.array([5, 6, 7]), 0.99, 0)
    assert (len(train), len(validation)) == (1, 2)  # however much is held out, something is left
    with pytest.raises(InputError, match=r"^all pairs share one prompt; at least two prompts are needed"):
        pairs.split_by_prompt(np.array([5, 5]), 0.2, 0)
    with pytest.raises(InputError, match=r"^only one pair is usable; at least two"):
        pairs.split_by_prompt(np.array([5]), 0.2, 0)


def test_rows_whose_roles_the_template_refuses_are_dropped(write_jsonl, tokenizer):
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + tokenizer.chat_template
    )
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    source = write_jsonl([PAIR, {**PAIR, "prompt": system}])
    found = list(pairs.readable_pairs(open_source(source).rows, refusing))
    assert [reason for *_, reason in found] == [None, "the chat template refuses these messages (no)"]
    assert found[0][1] and found[1][1] is None
    assert [reason for *_, reason in pairs.readable_pairs(open_source(source).rows, tokenizer)] == [None, None]


def test_tool_calls_are_text_in_a_pair_or_its_reason(write_jsonl, tokenizer):
    asked = {"role": "user", "content": "Is it cold?"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {"x": 1}}}]}
    said = {"role": "tool", "content": "4 degrees"}
    answers = {side: [call, said, {"role": "assistant", "content": PAIR[side]}] for side in ("chosen", "rejected")}
    source = write_jsonl(
        [{"prompt": [asked], **answers}, {**PAIR, "prompt": [asked, call, said]}, {**PAIR, "prompt": [asked, said]}]
    )
    showing = copy.deepcopy(tokenizer)
    showing.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    first, second, third = (pair for _, pair, _ in pairs.readable_pairs(open_source(source).rows, showing))
    text = {"role": "assistant", "content": '{"name": "look", "arguments": {"x": 1}}'}
    assert first["prompt"] == second["prompt"] == [asked, text, said]
    found = [(pair, reason) for _, pair, reason in pairs.readable_pairs(open_source(source).rows, tokenizer)]
    assert found[:2] == [(None, "the chat template does not show tool calls")] * 2
    assert found[2] == (third, None) and third["prompt"] == [asked, said]


def test_draws_are_of_the_wanted_size_and_fixed_by_the_seed():
    drawn = pairs.draw(50, 10, 42)
    assert len(set(drawn)) == 10 and list(drawn) == sorted(drawn) and drawn[-1] < 50
    assert np.array_equal(pairs.draw(50, 10, 42), drawn) and not np.array_equal(pairs.draw(50, 10, 43), drawn)
    assert [list(pairs.draw(3, limit, 0)) for limit in (None, 3, 4)] == [[0, 1, 2]] * 3


def test_the_share_of_validation_prompts_is_as_asked_and_grows_with_it():
    sides = {share: {key for key in range(2000) if pairs.is_validation_prompt(key, share, 42)} for share in (0.1, 0.3)}
    assert sides[0.1] < sides[0.3]  # strictly: a prompt held out stays so under a larger share
    assert abs(len(sides[0.1]) - 200) < 60 and abs(len(sides[0.3]) - 600) < 90  # 4.4 standard deviations


def test_the_halves_share_no_prompt_and_are_all_pairs():
    prompts = [f"Prompt {number // 3}" for number in range(30)]  # three pairs each
    rows = [
        check_pair({"prompt": prompt, "chosen": f"Yes {row}", "rejected": "No"}) for row, prompt in enumerate(prompts)
    ]
    split = Dataset.from_list([{**row, "chosen_ids": [number]} for number, row in enumerate(rows)])
    halves = [pairs.half_of(split, half, 42)["chosen_ids"] for half in (1, 2)]
    assert sorted(row for half in halves for (row,) in half) == list(range(30))
    sides = [{prompts[row] for (row,) in half} for half in halves]
    assert not sides[0] & sides[1] and len(sides[0]) == len(sides[1]) == 5
    assert pairs.half_of(split, None, 42)["chosen_ids"][:] == split["chosen_ids"][:]


@pytest.mark.parametrize("other", ["name a colour", "NAME  A\nCOLOUR!", "«Name a colour»…", "Name a ｃolour."])
def test_spellings_of_a_prompt_are_split_together_and_stay_pairs_of_their_own(other):
    one, two, third = (
        pairs.pair_keys(check_pair({**PAIR, "prompt": each})) for each in (PAIR["prompt"], other, "Red?")
    )
    assert one["spelling_key"] == two["spelling_key"] != third["spelling_key"]
    assert one["prompt_key"] != two["prompt_key"] and one["pair_key"] != two["pair_key"]
    columns = (np.array([key[name] for key in (one, two, third)]) for name in ("prompt_key", "spelling_key"))
    keys = pairs.split_keys(*columns)
    assert keys[0] == keys[1] == min(one["prompt_key"], two["prompt_key"]) and keys[2] == third["prompt_key"]


def test_a_prompt_of_signs_alone_keeps_them():
    signs = [pairs.spelling_key([{"role": "user", "content": text}]) for text in ("???", "!!!", "2 + 2", "2 - 2")]
    assert len(set(signs)) == 4


@pytest.mark.parametrize(
    "change, words",
    [
        ({"chosen": "Name a colour. Red."}, [pairs.REPEATS]),
        ({"rejected": "<|im_start|>user\nSeven."}, ["markup"]),
        ({"prompt": "Read this:\n### Instruction: obey"}, ["markup"]),
        ({"prompt": [{"role": "system", "content": " "}, {"role": "user", "content": "Hi"}]}, ["system turn is empty"]),
        ({"prompt": "Hi", "chosen": "Hi there", "rejected": "Human: what? is a play"}, ["markup"]),
        ({"prompt": "Hi", "chosen": "Hi there", "rejected": "It is human: see above"}, []),
        ({}, []),
    ],
)
def test_what_looks_wrong_is_said(change, words):
    found = pairs.suspicions(check_pair({**PAIR, **change}))
    assert len(found) == len(words) and all(part in whole for part, whole in zip(words, found, strict=True))


def test_warnings_count_and_name_three_places():
    tally = pairs.Tally()
    tally.pairs = 10
    for number in range(5):
        tally.warn("odd", f"row {number}")
    for number in range(3):
        tally.drop("null", f"row {number + 5}")
    tally.drop("tie", "row 9")
    assert tally.warnings() == {
        "30% of the pairs were dropped for one reason: null": {"count": 3, "first": ["row 5", "row 6", "row 7"]},
        "odd": {"count": 5, "first": ["row 0", "row 1", "row 2"]},
    }
    assert set(tally.summary()["first_dropped"]) == {"null", "tie"}
