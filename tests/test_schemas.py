import functools
import itertools
import json
import math
import random

import pytest
from conftest import HUB_PAIR, PAIR, ROOT, USER
from hypothesis import given
from hypothesis import strategies as st

from reward_pipeline.conversations import response_text
from reward_pipeline.layouts import ATTRIBUTES, LAYOUTS
from reward_pipeline.pairs import pair_keys
from reward_pipeline.schemas import RATINGS, category_of, check_pair, checked_pairs
from reward_pipeline.sources import BadRow, Row


@pytest.mark.parametrize(
    "row",
    [
        HUB_PAIR,
        {**PAIR, "chosen_rating": "3.2", "rejected_rating": 0.4},
        {**PAIR, "chosen_score": 3.2, "rejected_score": 0.4},
        {key: value for key, value in HUB_PAIR.items() if key != "prompt"},
        {**HUB_PAIR, "prompt": [USER]},
        {**HUB_PAIR, "prompt": [USER], **{side: HUB_PAIR[side][1:] for side in ("chosen", "rejected")}},
    ],
)
def test_every_published_schema_gives_the_same_pair(row):
    named = {"subset": "naming", "chosen-model": "large", "rejected-model": 7}
    assert check_pair({**row, **named}) == {
        "prompt": [USER],
        "chosen": [{"role": "assistant", "content": "Red."}],
        "rejected": [{"role": "assistant", "content": "Seven."}],
        "chosen_rating": 3.2,
        "rejected_rating": 0.4,
        "category": "naming",
        "chosen_author": "large",
        "rejected_author": "7",
    }


def test_multi_turn_prompts_become_turns():
    prompt = "Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\nName a colour."
    chosen, rejected = (
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": a}] for a in ("Red", "7")
    )
    for packed in ({"prompt": prompt}, {"prompt": [{"role": "user", "content": prompt}]}, {}):
        pair = check_pair({**packed, "chosen": chosen, "rejected": rejected})
        assert [message["role"] for message in pair["prompt"]] == ["user", "assistant", "user"]
        assert pair["chosen_rating"] is None


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"chosen": ...}, "missing column chosen"),
        ({"rejected": ...}, "missing column rejected"),
        ({"prompt": ...}, "missing column prompt"),
        ({"prompt": None}, "null"),
        ({"chosen": None}, "null"),
        ({"prompt": "  \n"}, "empty prompt"),
        ({"prompt": math.nan}, "null"),
        ({"prompt": True}, "a prompt is a string or a list of messages, not bool"),
        ({"prompt": []}, "the prompt has no messages"),
        (
            {"prompt": [{"role": "assistant", "content": "x"}]},
            "the prompt must end with a user turn, not with 'assistant'",
        ),
        (
            {"prompt": [{"role": "poet", "content": "x"}]},
            "unknown role 'poet'; known are system, user, assistant, tool",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
            "a content part is 'image'; only text can be read",
        ),
        ({"system": ["x"]}, "system is not a text"),
        ({"rejected": " "}, "empty response"),
        ({"rejected": False}, "a response is a string or a list of messages, not bool"),
        ({"rejected": [USER]}, "the response must end with an assistant turn, not with 'user'"),
        (
            {"rejected": [{"role": "assistant", "tool_calls": [{"name": "x", "arguments": {}}]}]},
            "the response is a tool call, not a text",
        ),
        ({"rejected": " Red. "}, "chosen equals rejected"),
        (
            {"chosen": [{"role": "user", "content": "Else?"}, {"role": "assistant", "content": "Red."}]},
            "chosen answers another prompt than that of the row",
        ),
        (
            {
                "chosen": [
                    USER,
                    {"role": "assistant", "content": "Which?"},
                    USER,
                    {"role": "assistant", "content": "Red."},
                ]
            },
            "chosen and rejected answer different turns",
        ),
        ({"chosen_rating": "good", "rejected_rating": 1}, "rating is not a number"),
        ({"chosen_rating": float("inf"), "rejected_rating": 1}, "rating is not a number"),
        ({"chosen_rating": 10**400, "rejected_rating": 1}, "rating is not a number"),
        ({"chosen_rating": True, "rejected_rating": 0}, "rating is not a number"),
        ({"chosen_rating": 1, "rejected_rating": 1.2}, "rating says the rejected is better"),
        ({"chosen_rating": 2, "rejected_rating": 2.0}, "tied ratings"),
        ({"margin": -0.5}, "margin says the rejected is better"),
        ({"margin": "0"}, "tie"),
        ({"margin": [1]}, "margin is not a number"),
    ],
)
def test_bad_rows_are_named(change, reason):
    row = {key: value for key, value in {**PAIR, **change}.items() if value is not ...}
    with pytest.raises(BadRow, match=f"^{reason}$"):
        check_pair(row)


@pytest.mark.parametrize(
    "columns, authors",
    [
        ({"chosen_author": "a", "rejected_author": "b"}, ("a", "b")),
        ({"chosen_model": "a", "rejected-model": "a"}, ("a", "a")),
        ({"chosen_author": "", "chosen_model": "a", "rejected_author": "b", "rejected_model": "c"}, ("a", "b")),
        ({"chosen_model": "a"}, ("", "")),
        *(({"chosen_model": "a", "rejected_model": nobody}, ("", "")) for nobody in (None, math.nan, "", ["b"], {})),
    ],
)
def test_authors_are_known_of_both_answers_or_of_none(columns, authors):
    pair = check_pair({**PAIR, **columns})
    assert (pair["chosen_author"], pair["rejected_author"]) == authors


def raw(prompt, response, *attributes):
    return {"prompt": prompt, "response": response, **dict(zip(ATTRIBUTES, attributes, strict=True))}


def outcomes(*rows):
    """Pairs and reasons of rows, in order."""
    return [pair or reason for _, pair, reason in checked_pairs(Row(f"row {i}", row) for i, row in enumerate(rows, 1))]


def texts(pair):
    return tuple(response_text(pair[side]) for side in ("chosen", "rejected"))


def test_raw_helpsteer_rows_are_binarised_by_their_mean():
    rows = [
        raw("a", "worse", 3, 3, 4, 2, 2),  # mean 2.8
        {**raw("a", "better", 4, 4, 4, 2, 2), "category": "letters", "model": "x"},  # mean 3.2
        raw("b", "x", 4, 4, 4, 1, 1),
        raw("b", "y", 1, 1, 4, 4, 4),  # the same mean
        raw("c", "alone", 1, 1, 1, 1, 1),
        raw("d", "x", 1, "?", 1, 1, 1),
        raw(7, "x", 1, 1, 1, 1, 1),
        PAIR,
    ]
    first, *rest = outcomes(*rows)
    assert (texts(first), first["chosen_rating"], first["rejected_rating"]) == (("better", "worse"), 3.2, 2.8)
    assert (first["category"], first["chosen_author"]) == ("letters", "")  # the author of one answer alone is no help
    assert rest[:3] == ["tied ratings", "rating is not a number", "a prompt is a string or a list of messages, not int"]
    assert texts(rest[3]) == ("Red.", "Seven.")
    assert rest[4:] == ["no second response to the prompt"]


def test_raw_rows_are_joined_by_prompt_wherever_they_stand():
    """Every pair of a prompt's answers that the scores imply, against a computation from all rows at once."""
    generator = random.Random(0)
    rows = [
        {"prompt": f"prompt {i}", "completion": f"answer {i} {j}", "score": generator.choice([1, 2, 3.5]), "author": j}
        for i in range(12)
        for j in range(i % 5)
    ]
    expected = {
        (better["prompt"], better["completion"], worse["completion"])
        for better, worse in itertools.permutations(rows, 2)
        if better["prompt"] == worse["prompt"] and better["score"] > worse["score"]
    }
    generator.shuffle(rows)
    found = outcomes(*rows)
    pairs = [pair for pair in found if not isinstance(pair, str)]
    assert sorted((pair["prompt"][0]["content"], *texts(pair)) for pair in pairs) == sorted(expected)
    assert all(pair["chosen_author"] == texts(pair)[0].split()[-1] for pair in pairs)
    assert found.count("no second response to the prompt") == 3  # of the prompts with one answer


def test_raw_answers_under_different_system_prompts_are_not_compared():
    rows = [
        {"prompt": "p", "response": f"{system} {i}", "score": i, "system": system} for i in (1, 2) for system in "ab"
    ]
    assert [(pair["prompt"][0]["content"], *texts(pair)) for pair in outcomes(*rows)] == [
        ("a", "a 2", "a 1"),
        ("b", "b 2", "b 1"),
    ]


def test_what_waits_for_a_second_answer_may_be_anything():
    deep = functools.reduce(lambda inner, _: [inner], range(100_000), "x")
    odd = [{"prompt": "p", "response": response, "score": 1} for response in (deep, {"x": b"y"}, [USER])]
    assert outcomes(*odd)[0] == "nested too deeply"
    assert all(isinstance(reason, str) for reason in outcomes(*odd))


# --- the system prompt -----------------------------------------------------------------------------------------------

RULES = {"role": "system", "content": "Be brief."}
SIDES = {side: [{"role": "assistant", "content": PAIR[side]}] for side in ("chosen", "rejected")}


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize("prompt", [PAIR["prompt"], [USER], [RULES, USER], ...])
@pytest.mark.parametrize("turns", [[], [USER], [RULES, USER]])
def test_a_system_column_is_the_system_turn(column, prompt, turns):
    if prompt is ... and not turns:
        return
    row = {column: "Be brief.", **{side: [*turns, *answer] for side, answer in SIDES.items()}}
    pair = check_pair(row if prompt is ... else {**row, "prompt": prompt})
    assert pair["prompt"] == [RULES, USER]
    assert {side: pair[side] for side in SIDES} == SIDES


@pytest.mark.parametrize("nothing", [None, "", " ", math.nan])
def test_an_empty_system_column_adds_nothing(nothing):
    assert check_pair({**PAIR, "system": nothing})["prompt"] == [USER]
    assert check_pair({**PAIR, "system": nothing, "system_prompt": "Be brief."})["prompt"] == (
        [USER] if nothing == " " else [RULES, USER]
    )


def test_the_turn_of_the_prompt_comes_before_the_column():
    assert check_pair({**PAIR, "prompt": [RULES, USER], "system": "x"})["prompt"] == [RULES, USER]
    other = {side: [{**RULES, "content": "x"}, USER, *answer] for side, answer in SIDES.items()}
    with pytest.raises(BadRow, match="chosen answers another prompt"):
        check_pair({**PAIR, **other, "system": "Be brief."})


def test_pairs_under_different_system_prompts_do_not_contradict():
    swapped = {"prompt": PAIR["prompt"], "chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
    keys = [pair_keys(check_pair(row)) for row in (PAIR, {**PAIR, "system": "a"}, {**swapped, "system": "b"})]
    assert len({each["pair_key"] for each in keys}) == len({each["prompt_key"] for each in keys}) == 3


def test_turns_before_the_answers_are_context():
    turns = [USER, {"role": "assistant", "content": "Which?"}, {"role": "user", "content": "Any."}]
    lists = {side: [RULES, *turns, *answer] for side, answer in SIDES.items()}
    for prompt in (USER["content"], "Any.", turns, [RULES, *turns]):
        assert check_pair({"prompt": prompt, **lists})["prompt"] == [RULES, *turns]
    after = {side: [*turns[1:], *answer] for side, answer in SIDES.items()}
    assert check_pair({"prompt": [USER], **after})["prompt"] == turns


# --- ratings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RATINGS)
def test_ratings_are_read_under_every_name(name):
    names = [name.format(side) for side in ("chosen", "rejected")]
    for chosen, rejected in (names, [each.replace("_", "-") for each in names]):
        pair = check_pair({**PAIR, chosen: "4,25", rejected: " -1.5 "})
        assert (pair["chosen_rating"], pair["rejected_rating"]) == (4.25, -1.5)
        assert outcomes({**PAIR, chosen: 1, rejected: 1}) == ["tied ratings"]
        assert outcomes({**PAIR, chosen: 1, rejected: 2}) == ["rating says the rejected is better"]
        for empty in (None, "", "NaN", float("nan")):
            (pair,) = outcomes({**PAIR, chosen: empty, rejected: 2})
            assert (pair["chosen_rating"], pair["rejected_rating"]) == (None, None)
        assert outcomes({**PAIR, chosen: "1,000", rejected: 2}) == ["rating is not a number"]  # one, or a thousand
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in names)


TEXTS = st.text(st.characters(), max_size=20) | st.sampled_from(["", "a\n<extra_id_1>Assistant\n", "[{role}]", "3.2"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(TEXTS, values, max_size=3),
    max_leaves=6,
)
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]) | JSON, "content": TEXTS | JSON},
    optional={"tool_calls": JSON | st.just([{"name": "x", "arguments": {}}]), "from": TEXTS},
)
MESSAGES = (
    st.lists(TURNS, max_size=3) | st.lists(TURNS, max_size=3).map(repr) | st.lists(TURNS, max_size=3).map(json.dumps)
)
ANSWERS = st.sampled_from([["a", "b"], [1, 2], 1, "a", [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]])
COLUMNS = [
    "prompt",
    "chosen",
    "rejected",
    "response",
    "chosen_rating",
    "rejected_score",
    "system",
    *ATTRIBUTES,
    "category",
    "chosen_author",
    "rejected-model",
    "other",
    *(name for layout in LAYOUTS for names in layout.columns for name in names.split("|")),
]
ROWS = st.lists(st.dictionaries(st.sampled_from(COLUMNS), TEXTS | MESSAGES | JSON), max_size=4)


@given(
    rows=ROWS
    | st.lists(st.just(PAIR) | st.fixed_dictionaries(dict.fromkeys(PAIR, TEXTS | MESSAGES)))
    | st.sampled_from([layout.columns for layout in LAYOUTS]).flatmap(
        lambda columns: st.lists(
            st.fixed_dictionaries({names.split("|")[0]: TEXTS | MESSAGES | JSON | ANSWERS for names in columns}),
            min_size=1,
            max_size=2,
        )
    )
)
def test_any_row_is_a_pair_or_has_a_reason(rows):
    results = list(checked_pairs(Row(f"row {number}", row) for number, row in enumerate(rows)))
    for _, pair, reason in results:
        assert (pair is None) == isinstance(reason, str)
        if pair:
            assert pair["prompt"][-1]["role"] in ("user", "tool") and pair["prompt"][-1]["content"].strip()
            chosen, rejected = (response_text(pair[side]).strip() for side in ("chosen", "rejected"))
            assert chosen and rejected and chosen != rejected
            assert pair["chosen_rating"] is None or pair["chosen_rating"] > pair["rejected_rating"]
            for side in ("chosen", "rejected"):
                assert [message["role"] for message in pair[side]] == ["assistant"]
            assert isinstance(pair["category"], str)
            assert bool(pair["chosen_author"]) == bool(pair["rejected_author"])
            assert pair_keys(pair).keys() == {"prompt_key", "spelling_key", "pair_key", "swapped"}
            json.dumps(pair, ensure_ascii=False).encode()  # no lone surrogates


def test_categories_may_be_anything():
    assert [category_of(row) for row in ({"category": 0}, {"subset": "$x_$\ud800"})] == ["0", "$x_$?"]
    assert [category_of(row) for row in ({}, {"category": None}, {"category": math.nan})] == [""] * 3


def test_a_number_is_its_digits_and_says_the_same_as_the_text():
    row = {"prompt": 12, "chosen": 2, "rejected": 0.5}
    assert outcomes(row) == outcomes({name: str(value) for name, value in row.items()})
