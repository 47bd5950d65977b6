"""Each published layout gives the pair that its labels mean, and a row without one gives the reason."""

import itertools
import json
import math
import re

import pytest
from conftest import PAIR, ROOT, USER

from reward_pipeline.files import InputError
from reward_pipeline.layouts import LAYOUTS, in_our_columns, number, recognised, renamed
from reward_pipeline.schemas import checked_pairs
from reward_pipeline.sources import BadRow, Row

GOOD, BAD = "Red.", "Seven."
GREETING = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
SPOKEN = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Name a colour.\n\nAssistant:"
QUESTION = USER["content"]
SHAREGPT = [
    {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}, {"from": "human", "value": QUESTION},
]  # fmt: skip


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


# Name of the layout, a row of it, whether the prompt has the greeting before it.
PUBLISHED = [
    (
        "votes",
        {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD, "vote": "right", "voter": "Ada", "margin": 1},
        False,
    ),
    ("TRL, explicit prompt", {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD, "instruction": "x"}, False),
    ("LLaMA-Factory alpaca", {"instruction": QUESTION, "input": "", "chosen": GOOD, "rejected": BAD}, False),
    (
        "LLaMA-Factory alpaca",
        {"instruction": QUESTION, "history": [["Hi", "Hello!"]], "chosen": GOOD, "rejected": BAD},
        True,
    ),
    (
        "ColossalChat",
        {
            "context": [{"from": "human", "content": QUESTION}],
            "chosen": {"from": "assistant", "content": GOOD},
            "rejected": {"from": "assistant", "content": BAD},
        },
        False,
    ),
    (
        "LLaMA-Factory sharegpt",
        {
            "conversations": SHAREGPT,
            "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD},
        },
        True,
    ),
    ("Orca", {"question": QUESTION, "chosen": GOOD, "rejected": BAD}, False),
    ("hh-rlhf", {"chosen": f"{SPOKEN} {GOOD}", "rejected": f"{SPOKEN} {BAD}"}, True),
    (
        "TRL, implicit prompt",
        {"chosen": [*GREETING, USER, *said(GOOD)], "rejected": [*GREETING, USER, *said(BAD)]},
        True,
    ),
    ("ms-swift", {"messages": [*GREETING, USER, *said(GOOD)], "rejected_response": BAD}, True),
    ("pos and neg", {"prompt": QUESTION, "pos": GOOD, "neg": BAD}, False),
    (
        "UltraFeedback of Argilla",
        {"instruction": QUESTION, "chosen_response": GOOD, "rejected_response": BAD},
        False,
    ),
    (
        "HelpSteer2-preference",
        {"prompt": QUESTION, "response_1": GOOD, "response_2": BAD, "preference_strength": -2},
        False,
    ),
    (
        "HelpSteer3",
        {"context": [*GREETING, USER], "response1": BAD, "response2": GOOD, "overall_preference": 1},
        True,
    ),
    (
        "PKU-SafeRLHF",
        {"prompt": QUESTION, "response_0": BAD, "response_1": GOOD, "better_response_id": 1, "safer_response_id": 0},
        False,
    ),
    ("SHP", {"history": QUESTION, "human_ref_A": GOOD, "human_ref_B": BAD, "labels": 1}, False),
    ("SHP", {"history": QUESTION, "human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0}, False),
    (
        "Nectar",
        {"prompt": f"{SPOKEN} ", "answers": [{"answer": BAD, "rank": 2.0}, {"answer": GOOD, "rank": 1.0}]},
        True,
    ),
    (
        "NeMo-RL",
        {
            "context": [USER],
            "completions": [{"rank": 1, "completion": said(BAD)}, {"rank": 0, "completion": said(GOOD)}],
        },
        False,
    ),
    (
        "Chatbot Arena",
        {
            "conversation_a": [*GREETING, USER, *said(BAD)],
            "conversation_b": [*GREETING, USER, *said(GOOD)],
            "winner": "model_b",
        },
        True,
    ),
    (
        "Arena of LMSYS on Kaggle",
        {
            "prompt": json.dumps([GREETING[0]["content"], QUESTION]),
            "response_a": json.dumps([GREETING[1]["content"], GOOD]),
            "response_b": json.dumps([GREETING[1]["content"], BAD]),
            **{"winner_model_a": "1", "winner_model_b": "0", "winner_tie": "0"},
        },
        True,
    ),
    ("Stack Exchange, paired", {"qid": 1, "question": QUESTION, "response_j": GOOD, "response_k": BAD}, False),
    (
        "WebGPT comparisons",
        {
            **{"question": {"full_text": QUESTION}, "answer_0": BAD, "answer_1": GOOD},
            **{"score_0": -0.5, "score_1": 0.5},
        },
        False,
    ),
    ("Distilabel", {"prompt": QUESTION, "responses": [BAD, GOOD], "scores": [0.1, 0.9]}, False),
    ("Distilabel", {"instruction": QUESTION, "generations": [BAD, GOOD], "ratings": [1, 4.5]}, False),
    ("Distilabel", {"prompt": QUESTION, "responses": [GOOD, BAD, "-"], "ratings": [5, 2, None]}, False),
    ("labelled answers", {"question": QUESTION, "answer_a": BAD, "answer_b": GOOD, "choice": "B"}, False),
    ("labelled answers", {"instruction": QUESTION, "output_1": BAD, "output_2": GOOD, "preference": 2.0}, False),
    ("labelled answers", {"question": QUESTION, "response_A": GOOD, "response_B": BAD, "label": "A>>B"}, False),
    ("labelled answers", {"prompt": QUESTION, "Answer A": BAD, "Answer B": GOOD, "Winner": "[[B]]"}, False),
    ("RewardBench 2", {"prompt": QUESTION, "chosen": [GOOD], "rejected": [BAD]}, False),
    (
        "UltraFeedback",
        {
            "instruction": QUESTION,
            "completions": [{"response": BAD, "overall_score": 2.5}, {"response": GOOD, "overall_score": "7"}],
        },
        False,
    ),
    ("TRL, explicit prompt", {"Prompt": QUESTION, "Chosen ": GOOD, "REJECTED": BAD}, False),
    ("labelled answers", {"prompt": QUESTION, "response_a": GOOD, "response_b": BAD, "label": "response_a"}, False),
]


def outcomes(row):
    """Pairs and reasons of one row."""
    return [pair or reason for _, pair, reason in checked_pairs([Row("row 1", row)])]


@pytest.mark.parametrize("name, row, greeted", PUBLISHED)
def test_every_layout_gives_the_pair_that_its_label_means(name, row, greeted):
    assert recognised(row).name == name
    (pair,) = outcomes(row)
    assert pair["prompt"] == [*(GREETING if greeted else []), USER]
    assert (pair["chosen"], pair["rejected"]) == (said(GOOD), said(BAD))


def test_every_layout_is_tried_and_listed():
    assert {name for name, *_ in PUBLISHED} == {layout.name for layout in LAYOUTS} - {
        "HelpSteer2",
        "scored answers",
        "OpenAI summaries",  # whose prompt is the post with what asks for a summary
    }
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    table = re.search(r"\| read as \| .*\n\|---\|---\|---\|\n((?:\|.*\n)+)", page)[1].splitlines()
    shown = [
        f"| {layout.name} | {layout.words} | "
        + ", ".join(" or ".join(f"`{name}`" for name in names.split("|")) for names in layout.columns)
        + " |"
        for layout in LAYOUTS
    ]
    assert table == shown


@pytest.mark.parametrize(
    "name, change, reason",
    [
        ("HelpSteer2-preference", {"preference_strength": 0}, "tie"),
        ("HelpSteer2-preference", {"preference_strength": None}, "column preference_strength is empty"),
        ("HelpSteer3", {"overall_preference": "better"}, "overall_preference is not a number"),
        ("PKU-SafeRLHF", {"better_response_id": 2}, "better_response_id is neither 0 nor 1"),
        ("PKU-SafeRLHF", {"response_0": float("nan")}, "column response_0 is empty"),
        ("SHP", {"labels": ""}, "column labels is empty"),
        ("Chatbot Arena", {"winner": "tie (bothbad)"}, "tie"),
        ("Chatbot Arena", {"winner": "model_c"}, "winner is neither a, b nor a tie"),
        (
            "Chatbot Arena",
            {"conversation_a": [USER, *said(BAD)]},
            "rejected answers another prompt than that of the row",
        ),
        ("labelled answers", {"choice": None}, "column choice is empty"),
        ("labelled answers", {"choice": 1}, "choice is neither a, b nor a tie"),  # the first, or the second from 0
        ("labelled answers", {"choice": "A=B"}, "tie"),
        (
            "UltraFeedback",
            {"completions": [{"response": GOOD}]},
            "has the columns of UltraFeedback, but not its values",
        ),
        ("hh-rlhf", {"rejected": "Seven."}, "text is not the transcript of a dialogue"),
        (
            "hh-rlhf",
            {"rejected": "\n\nHuman: Hi\n\nAssistant: No."},
            "rejected answers another prompt than that of the row",
        ),
        ("votes", {"vote": "tie"}, "tie"),
        ("votes", {"vote": "both bad"}, "both answers are bad"),
        ("votes", {"vote": "skip"}, "vote was skipped"),
        ("votes", {"vote": ["left"]}, "vote is neither left, right nor undecided"),
        ("Nectar", {"answers": [{"answer": GOOD, "rank": 1}]}, "fewer than two ranked answers"),
        ("Nectar", {"answers": [{"answer": GOOD, "rank": 1}, {"answer": BAD, "rank": 1}]}, "tie"),
        ("Nectar", {"answers": [GOOD, BAD]}, "has the columns of Nectar, but not its values"),
        ("Distilabel", {"ratings": [3, 3]}, "tied ratings"),
        ("Distilabel", {"ratings": [3]}, "has the columns of Distilabel, but not its values"),
        ("Distilabel", {"ratings": [3, "?"]}, "rating is not a number"),
        ("LLaMA-Factory alpaca", {"instruction": math.nan}, "column instruction is empty"),
    ],
)
def test_ties_and_missing_labels_have_their_reasons(name, change, reason):
    row = next(row for other, row, _ in PUBLISHED if other == name)
    assert outcomes({**row, **change}) == [reason]


def test_a_summary_is_asked_for_below_its_post():
    summaries = [{"text": BAD, "policy": "p"}, {"text": GOOD, "policy": "q"}]
    (pair,) = outcomes({"info": {"post": "A long story."}, "summaries": summaries, "choice": 1})
    assert pair["prompt"][0]["content"] == "A long story.\n\nTL;DR:" and pair["chosen"] == said(GOOD)
    assert (pair["chosen_author"], pair["rejected_author"]) == ("q", "p")


def test_a_ranking_is_every_pair_that_it_implies():
    texts = {"a": 2, "b": 1, "c": 3, "d": 3}
    answers = [{"answer": text, "rank": rank, "model": f"model {text}"} for text, rank in texts.items()]
    pairs = outcomes({"prompt": "p", "answers": answers})
    found = [tuple(pair[side][0]["content"] for side in ("chosen", "rejected")) for pair in pairs if pair != "tie"]
    assert sorted(found) == sorted((x, y) for x, y in itertools.permutations(texts, 2) if texts[x] < texts[y])
    assert pairs.count("tie") == 1
    named = [pair for pair in pairs if pair != "tie"]
    assert all(pair["chosen_author"] == f"model {pair['chosen'][0]['content']}" for pair in named)
    assert all(pair["rejected_author"] == f"model {pair['rejected'][0]['content']}" for pair in named)
    assert all(pair["chosen_rating"] is None for pair in named)  # ranks are no ratings


def test_sets_of_answers_are_every_pair_of_them():
    pairs = outcomes({"prompt": "p", "chosen": ["a", "b"], "rejected": ["c", "d", ""]})
    assert [pair if isinstance(pair, str) else pair["chosen"] + pair["rejected"] for pair in pairs] == [
        said("a") + said("c"), said("a") + said("d"), "empty response",
        said("b") + said("c"), said("b") + said("d"), "empty response",
    ]  # fmt: skip


def test_ratings_and_authors_go_with_their_answers():
    row = {"input": "p", "generations": ["a", "b"], "ratings": [1, 4], "generation_models": ["small", "large"]}
    (pair,) = outcomes(row)
    assert (pair["chosen_rating"], pair["rejected_rating"]) == (4, 1)
    assert (pair["chosen_author"], pair["rejected_author"]) == ("large", "small")
    arena = next(row for name, row, _ in PUBLISHED if name == "Chatbot Arena")
    (pair,) = outcomes({**arena, "model_a": "small", "model_b": "large", "domain": "colours"})
    assert (pair["chosen_author"], pair["rejected_author"], pair["category"]) == ("large", "small", "colours")


def test_the_input_of_an_instruction_stands_below_it():
    (pair,) = outcomes({"instruction": "Shorten.", "input": "A red car.", "chosen": "A car.", "rejected": "No."})
    assert pair["prompt"] == [{"role": "user", "content": "Shorten.\nA red car."}]


def test_rows_of_no_known_layout_are_refused_with_the_columns_of_the_first():
    rows = [
        *({"text": "x", "good": "y"}, {"other": "x"}, {"prompt": "p", "chosen": "x"}, {"chosen": "x", "rejected": "y"}),
        {**dict.fromkeys("a" * n for n in range(1, 30))},
        {},
    ]
    reasons = [row.problem for row in in_our_columns(Row("row", row) for row in rows)]
    assert reasons[0] == "missing column chosen: there are text, good (--columns takes other names)"
    assert reasons[1] == reasons[4] == reasons[5] == reasons[0]  # one line of the count, however many columns there are
    assert reasons[2:4] == [
        "missing column rejected: there are prompt, chosen (--columns takes other names)",
        "missing column prompt: there are chosen, rejected (--columns takes other names)",
    ]
    (long,) = in_our_columns([Row("row", rows[4])])
    assert len(long.problem) < 400
    (empty,) = in_our_columns([Row("row", {})])
    assert "there are none" in empty.problem


def named(rows, *columns):
    return [row.values for row in renamed((Row(f"row {i}", row) for i, row in enumerate(rows, 1)), columns)]


def test_columns_are_renamed_by_the_user():
    row = {"question": QUESTION, "prompt": "a name", "better": {"texts": [GOOD]}, "a.b": BAD, "category": "colours"}
    (found,) = named([row], "prompt=question", "chosen=better.texts.0", "rejected=a.b")
    assert found == {
        "prompt": QUESTION,
        "chosen": GOOD,
        "rejected": BAD,
        "category": "colours",
        "better": row["better"],
    }
    (pair,) = outcomes(found)
    assert (pair["prompt"], pair["chosen"], pair["category"]) == ([USER], said(GOOD), "colours")
    swapped = {"prompt": QUESTION, "chosen": BAD, "rejected": GOOD}
    assert named([swapped], "chosen=rejected", "rejected=chosen") == [{**swapped, "chosen": GOOD, "rejected": BAD}]
    assert named([swapped]) == [swapped]
    (found,) = named([{"a": f"{SPOKEN} {GOOD}", "b": f"{SPOKEN} {BAD}"}], "chosen=a", "rejected=b")
    assert recognised(found).name == "hh-rlhf"  # layouts are looked for under the new names


def test_a_name_that_no_row_has_is_an_error():
    rows = [{"a": 1}, {"a": 1, "b": 2}]
    assert named(rows, "prompt=a", "chosen=b") == [{"prompt": 1}, {"prompt": 1, "chosen": 2}]
    for path in ("c", "a.b", "a.0"):
        with pytest.raises(
            InputError, match=f"--columns: no column {path} in row 2 and those before it; there are a, b$"
        ):
            named(rows, "prompt=a", f"chosen={path}")
    with pytest.raises(InputError, match="names a column twice"):
        named(rows, "prompt=a", "prompt=b")
    read = renamed((Row(f"row {i}", {"a": 1}) for i in itertools.count(1)), ["prompt=b"])
    with pytest.raises(InputError, match=r"in row 1000 and"):  # a source without an end
        list(read)
    assert list(renamed([Row("row 1", {}, "not valid JSON")], ["prompt=b"])) == [Row("row 1", {}, "not valid JSON")]


def test_columns_that_are_null_are_those_of_other_sources():
    others = dict.fromkeys(column for _, row, _ in PUBLISHED for column in row)
    for name, row, greeted in PUBLISHED:
        assert recognised({**others, **row}).name == name
        (pair,) = outcomes({**others, **row})
        assert pair["prompt"] == [*(GREETING if greeted else []), USER]


def test_lists_written_as_text_are_lists():
    for name, row, _ in (published for published in PUBLISHED if published[0] != "RewardBench 2"):  # lists of texts
        text = {column: repr(value) if isinstance(value, list | dict) else value for column, value in row.items()}
        assert recognised(text).name == name
        assert outcomes(text) == outcomes(row)


@pytest.mark.parametrize(
    "text, value", [("4,2", 4.2), (" -0,5 ", -0.5), (",5", 0.5), ("1,25", 1.25), ("1.5", 1.5), ("1,0000", 1.0), (3, 3)]
)
def test_numbers_may_have_a_decimal_comma(text, value):
    assert number(text) == value


@pytest.mark.parametrize("text", ["1,000", "1,2,3", "1.000,5", "4,", ",", True, None, math.nan, 10**400])
def test_what_may_be_something_else_is_no_number(text):
    with pytest.raises(BadRow, match="rating is not a number"):
        number(text)


@pytest.mark.parametrize("score", ["score", "rating", "reward", "label"])
@pytest.mark.parametrize("answer", ["response", "completion", "answer", "output"])
def test_scored_answers_become_pairs(score, answer):
    rows = [
        {"instruction": "Name a", "input": "colour.", answer: text, score: i} for i, text in ((0, BAD), (1.5, GOOD))
    ]
    assert recognised(rows[0]).name == "scored answers"
    ((_, pair, _),) = checked_pairs(Row("row", row) for row in rows)
    assert pair["prompt"][0]["content"] == "Name a\ncolour."
    assert (pair["chosen"], pair["rejected"], pair["chosen_rating"]) == (said(GOOD), said(BAD), 1.5)


def test_wanted_and_unwanted_answers_become_pairs():
    rows = [{"prompt": "p", "completion": text, "label": text == GOOD} for text in (BAD, GOOD, "Eight.")]
    results = checked_pairs(Row("row", row) for row in rows)
    found = [pair["rejected"] if pair else reason for _, pair, reason in results]
    assert found == [said(BAD), "tied ratings", said("Eight.")]


def test_what_could_not_be_read_keeps_its_reason_and_pairs_pass():
    rows = [Row("row 2", {}, "not valid JSON"), Row("row 3", PAIR)]
    assert list(in_our_columns(rows)) == rows
