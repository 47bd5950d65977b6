import json
import math

import pytest
from conftest import HUB_PAIR, PAIR, USER
from hypothesis import given
from hypothesis import strategies as st

from reward_pipeline.conversations import response_text
from reward_pipeline.layouts import ATTRIBUTES, LAYOUTS
from reward_pipeline.pairs import pair_keys
from reward_pipeline.schemas import category_of, check_pair, checked_pairs, join_raw_rows
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
        ({"prompt": 5}, "prompt is not a conversation that ends with a user turn"),
        (
            {"prompt": [{"role": "assistant", "content": "x"}]},
            "prompt is not a conversation that ends with a user turn",
        ),
        ({"rejected": " "}, "empty response"),
        ({"rejected": 7}, "response is not a text or message list"),
        ({"rejected": [USER]}, "response is not a text or message list"),
        ({"rejected": " Red. "}, "chosen equals rejected"),
        (
            {"chosen": [{"role": "user", "content": "Else?"}, {"role": "assistant", "content": "Red."}]},
            "response repeats another prompt",
        ),
        ({"chosen_rating": "good", "rejected_rating": 1}, "rating is not a number"),
        ({"chosen_rating": float("nan"), "rejected_rating": 1}, "rating is not a number"),
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


def test_raw_helpsteer_rows_are_binarised_by_their_mean():
    rows = [
        {**raw("a", "worse", 3, 3, 4, 2, 2), "category": "letters"},  # mean 2.8
        raw("a", "better", 4, 4, 4, 2, 2),  # mean 3.2
        raw("b", "x", 4, 4, 4, 1, 1),
        raw("b", "y", 1, 1, 4, 4, 4),  # the same mean
        raw("c", "alone", 1, 1, 1, 1, 1),
        raw("d", "x", 1, None, 1, 1, 1),
        raw("d", "y", 1, 1, 1, 1, 1),
        PAIR,
    ]
    joined = list(join_raw_rows(Row(f"row {i}", row) for i, row in enumerate(rows, start=1)))
    assert joined[0].values == {
        "prompt": "a", "chosen": "better", "rejected": "worse", "chosen_rating": 3.2, "rejected_rating": 2.8,
        "category": "letters",
    }  # fmt: skip
    with pytest.raises(BadRow, match="tied ratings"):
        check_pair(joined[1].values)
    assert [row.problem for row in joined[2:]] == ["no second response to the prompt", "rating is not a number", None]
    assert joined[-1].values == PAIR


TEXTS = st.text(st.characters(), max_size=20) | st.sampled_from(["", "a\n<extra_id_1>Assistant\n", "[{role}]", "3.2"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(TEXTS, values, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]) | JSON, "content": TEXTS | JSON}),
    max_size=3,
)
ANSWERS = st.sampled_from([["a", "b"], [1, 2], 1, "a", [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]])
COLUMNS = [
    "prompt",
    "chosen",
    "rejected",
    "response",
    "chosen_rating",
    "rejected_score",
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
            assert pair["prompt"][-1]["role"] == "user" and pair["prompt"][-1]["content"].strip()
            chosen, rejected = (response_text(pair[side]).strip() for side in ("chosen", "rejected"))
            assert chosen and rejected and chosen != rejected
            assert pair["chosen_rating"] is None or pair["chosen_rating"] > pair["rejected_rating"]
            for side in ("chosen", "rejected"):
                assert [message["role"] for message in pair[side]] == ["assistant"]
            assert isinstance(pair["category"], str)
            assert bool(pair["chosen_author"]) == bool(pair["rejected_author"])
            assert pair_keys(pair).keys() == {"prompt_key", "pair_key", "swapped"}
            json.dumps(pair, ensure_ascii=False).encode()  # no lone surrogates


def test_categories_may_be_anything():
    assert [category_of(row) for row in ({"category": 0}, {"subset": "$x_$\ud800"})] == ["0", "$x_$?"]
    assert [category_of(row) for row in ({}, {"category": None}, {"category": math.nan})] == [""] * 3
