"""Votes: on the disk whatever happens, counted by hand, and read as pairs."""

import datetime
import json
import os
import signal

import numpy as np
import pytest
from conftest import FORK, refuse_system_turns, run_main
from datasets import concatenate_datasets, load_from_disk

from reward_pipeline.evaluator import RewardModelEvaluator
from reward_pipeline.files import InputError
from reward_pipeline.form import form_differences, form_margins
from reward_pipeline.statistics import rate_interval
from reward_pipeline.votes import (
    CHOICES,
    Duel,
    append_vote,
    judge_votes,
    read_votes,
    results,
    seen_prompts,
    vote_row,
)

SIDES_OF_PAIR = ("chosen", "rejected")
LONG, SHORT = "Is it red? Yes, it is.", "Red."


def said(text: str, role: str = "assistant") -> list[dict]:
    return [{"role": role, "content": text}]


def vote(choice: str, voter="Ada", prompt="q", texts=(LONG, SHORT), models=("m", "n"), category="") -> dict:
    """A vote between two texts, the first one on the left."""
    return vote_row(Duel(said(prompt, "user"), *texts, *models, category), choice, voter)


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice, chosen, margin", [("left", 0, 1), ("right", 1, 1), ("tie", 0, 0), ("both bad", 0, 0), ("skip", 0, 0)]
)
def test_a_vote_is_a_pair_with_the_winner_first(choice, chosen, margin):
    row, rejected = vote(choice, category="colours"), 1 - chosen
    assert row["prompt"] == said("q", "user") and (row["vote"], row["voter"]) == (choice, "Ada")
    for side, place in (("chosen", chosen), ("rejected", rejected)):
        assert row[side] == said((LONG, SHORT)[place])
        assert row[f"{side}_author"] == ("m", "n")[place]
        assert row[f"{side}_position"] == ("left", "right")[place]
    assert (row["margin"], row["category"]) == (margin, "colours")
    assert datetime.datetime.fromisoformat(row["time"]).utcoffset() == datetime.timedelta(0)
    assert row["vote_id"] != vote(choice)["vote_id"]


@pytest.mark.parametrize("choice", ["", "Left", "both_bad", None])
def test_another_choice_is_refused(choice):
    with pytest.raises(InputError, match="is no vote; one of left, right, tie, both bad, skip is"):
        vote(choice)


# --- on the disk -----------------------------------------------------------------------------------------------------


def test_votes_come_back_as_they_were_given(tmp_path):
    path = tmp_path / "new" / "directory" / "votes.jsonl"
    assert read_votes(path) == ([], 0)
    given = [vote(choice, "Åsa 🦔\u2028", texts=("é\r\n\x85 \u2029", "\0 «да»")) for choice in CHOICES]
    for row in given:
        append_vote(path, row)
    assert read_votes(path) == (given, 0)
    assert len(path.read_bytes().splitlines()) == 5


def test_a_lone_surrogate_becomes_a_question_mark(tmp_path):
    append_vote(tmp_path / "votes.jsonl", vote("left", "A\ud800da", texts=("a\udfff", "b")))
    ((row,), broken) = read_votes(tmp_path / "votes.jsonl")
    assert (row["voter"], row["chosen"], broken) == ("A?da", said("a?"), 0)


@pytest.mark.parametrize("torn", [b'{"prompt": [{"role": "us', b'{"voter": "\xd0', b"{}"])
def test_a_torn_last_line_stays_by_itself(tmp_path, torn):
    path, (first, second, third) = tmp_path / "votes.jsonl", (vote("left"), vote("right"), vote("tie"))
    append_vote(path, first)
    with path.open("ab") as file:
        file.write(torn)
    assert read_votes(path) == ([first], 1)
    append_vote(path, second)
    append_vote(path, third)
    assert read_votes(path) == ([first, second, third], 1)
    assert path.read_bytes().splitlines()[1] == torn


def test_a_last_line_without_its_end_is_not_lost(tmp_path):
    """Editors leave files so."""
    path, (first, second) = tmp_path / "votes.jsonl", (vote("left"), vote("right"))
    path.write_text(json.dumps(first))
    append_vote(path, second)
    assert read_votes(path) == ([first, second], 0)


def test_a_full_disk_takes_no_part_of_a_vote(small_disk):
    path, earlier = small_disk("size=32k") / "votes.jsonl", vote("left")
    append_vote(path, earlier)
    with path.open("ab") as file:
        file.write(b"torn")
    before, large = path.read_bytes(), vote("right", texts=("x" * 60_000, "y"))
    for _ in range(2):
        with pytest.raises(InputError, match=r"votes.jsonl: the vote was not saved \(.*No space left") as refused:
            append_vote(path, large)
        assert "\n" not in str(refused.value)
        assert path.read_bytes() == before
    small_disk("remount,size=1m")
    append_vote(path, large)
    assert read_votes(path) == ([earlier, large], 1)


def test_the_first_vote_on_a_full_disk_is_refused(small_disk):
    directory = small_disk("size=32k")
    (directory / "filler").write_bytes(b"x" * 32 * 1024)
    with pytest.raises(InputError, match="the vote was not saved"):
        append_vote(directory / "votes.jsonl", vote("left"))
    assert read_votes(directory / "votes.jsonl") == ([], 0)
    (directory / "filler").unlink()
    append_vote(directory / "votes.jsonl", vote("left"))
    assert len(read_votes(directory / "votes.jsonl")[0]) == 1


def test_a_directory_in_place_of_the_file_is_named(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}: can not be read .*name another file") as unread:
        read_votes(tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path}: the vote was not saved") as unsaved:
        append_vote(tmp_path, vote("left"))
    assert "\n" not in f"{unread.value}{unsaved.value}"


def append_many(path, voter: str, count: int, start) -> None:
    start.wait()
    for number in range(count):
        append_vote(path, vote("left", voter, f"q {number}"))


def test_two_processes_lose_no_vote(tmp_path):
    path, start = tmp_path / "votes.jsonl", FORK.Barrier(2)
    processes = [FORK.Process(target=append_many, args=(path, voter, 30, start)) for voter in ("Ada", "Bo")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    votes, broken = read_votes(path)
    for voter in ("Ada", "Bo"):
        own = [each["prompt"][0]["content"] for each in votes if each["voter"] == voter]
        assert own == [f"q {number}" for number in range(30)]
    assert (len(votes), broken) == (60, 0)


def append_for_ever(path, voter: str, report: int) -> None:
    while True:
        row = vote("left", voter, texts=("x" * 20_000, "y"))
        append_vote(path, row)
        os.write(report, row["vote_id"].encode() + b"\n")


def test_a_killed_process_loses_no_vote_that_it_reported(tmp_path):
    path, reported = tmp_path / "votes.jsonl", []
    for number in range(5):  # the next one begins after what the last one left
        receive, send = os.pipe()
        process = FORK.Process(target=append_for_ever, args=(path, f"voter {number}", send))
        process.start()
        os.close(send)
        with os.fdopen(receive, "rb") as pipe:
            own = [pipe.readline() for _ in range(3 + 2 * number)]
            os.kill(process.pid, signal.SIGKILL)
            own += pipe.readlines()
        process.join(timeout=60)
        assert process.exitcode == -signal.SIGKILL
        reported += [each.decode().strip() for each in own]
    votes, broken = read_votes(path)
    kept = [each["vote_id"] for each in votes]
    assert len(reported) >= 35 and [each for each in kept if each in set(reported)] == reported
    assert len(kept) - len(reported) + broken <= 5  # one of each may be whole or torn without having been reported


GOOD = vote("left")
NO_VOTES = [
    *[{name: value for name, value in GOOD.items() if name != left_out} for left_out in (
        "prompt", "chosen", "rejected", "vote", "voter", "chosen_author", "rejected_author", "chosen_position",
    )],
    *[{**GOOD, name: 7} for name in ("prompt", "chosen", "rejected", "vote", "voter", "chosen_author")],
    *[{**GOOD, "vote": each} for each in ("maybe", [], {}, None)],
    *[{**GOOD, "chosen": each} for each in ("text", [], {}, ["text"], [{}], [{"role": "assistant", "content": 5}])],
    *[{**GOOD, "prompt": each} for each in ("text", [5], [[]], [{"role": "user"}], [{"role": "user", "content": 3}])],
    *[[GOOD], None, 5, "text", {}],
]  # fmt: skip


def test_lines_that_hold_no_vote_are_counted(tmp_path):
    nested = json.dumps({**GOOD, "prompt": 0}).replace('"prompt": 0', f'"prompt": {"[" * 100_000}{"]" * 100_000}')
    deep = json.dumps({**GOOD, "prompt": 0}).replace('"prompt": 0', f'"prompt": {"[" * 900}{"]" * 900}')
    lines = [*map(json.dumps, NO_VOTES), nested, deep, "no JSON", "{", "9" * 5000, "\ufeff"]
    raw = [*(line.encode() for line in lines), b"\xff\xfe\xff", json.dumps(GOOD).encode()[:-9]]
    good = json.dumps(GOOD).encode()
    (tmp_path / "votes.jsonl").write_bytes(b"\n".join([good, b"", b"  ", *raw, good]) + b"\r\n\n")
    assert read_votes(tmp_path / "votes.jsonl") == ([GOOD, GOOD], len(raw))


# --- what they say ---------------------------------------------------------------------------------------------------

EQUAL = ("Red.", "Sea?")  # in length
VOTES = [
    vote("left", "Ada", "q1"),  # m wins, the longer one
    vote("right", "Ada", "q2"),  # n wins, the shorter one
    vote("left", "Ada", "q3", models=("n", "m")),  # n wins, the longer one
    vote("tie", "Ada", "q4"),
    vote("both bad", "Ada", "q5"),
    vote("skip", "Ada", "q6"),
    vote("right", "Bo", " q1\n", models=("n", "m")),  # m wins, the shorter one
    vote("left", "Bo", "q2", EQUAL),  # m wins
]
JUDGED = [0.5, np.nan, -1.0, 9.0, np.nan, np.nan, 0.3, np.nan]  # what is said of a tie does not count
FORM = {"questions": -1.0}  # so that the answer without a question mark is the better one


def shares(row: dict, *names: str) -> list:
    return [row[name] for name in names]


def test_results_are_those_of_hand():
    ada, bo, everyone = results(VOTES, FORM, JUDGED)
    assert [(row["model"], row["other"], row["voter"]) for row in (ada, bo, everyone)] == [
        ("m", "n", "Ada"),
        ("m", "n", "Bo"),
        ("m", "n", None),
    ]
    counts = ("votes", "wins", "losses", "tie", "both_bad", "skip")
    assert shares(ada, *counts) == [6, 1, 2, 1, 1, 1]
    assert shares(bo, *counts) == [2, 2, 0, 0, 0, 0]
    assert shares(everyone, *counts) == [8, 3, 2, 1, 1, 1]
    names = ("win_rate", "left_rate", "longer", "form", "judge")
    assert shares(ada, *names) == pytest.approx([(1 + 0.5 + 0.5) / 5, 2 / 3, 2 / 3, 1 / 3, 1 / 2])
    assert shares(bo, *names) == pytest.approx([1, 1 / 2, (0 + 0.5) / 2, (1 + 1) / 2, 1])
    assert shares(everyone, *names) == pytest.approx([(3 + 0.5 + 0.5) / 7, 3 / 5, 2.5 / 5, 3 / 5, 2 / 3])
    speakers = ("longer_n", "form_n", "judge_n")
    assert [shares(row, *speakers) for row in (ada, bo, everyone)] == [[3, 3, 2], [2, 2, 1], [5, 5, 3]]


def test_intervals_are_over_prompts():
    everyone = results(VOTES, FORM, JUDGED)[-1]
    prompts = ["q1", "q2", "q3", "q4", "q5", "q1", "q2"]  # outer white space makes no other one
    assert everyone["win_rate_interval"] == rate_interval(np.array([1, 0, 0, 0.5, 0.5, 1, 1]), prompts)
    decided = ["q1", "q2", "q3", "q1", "q2"]
    assert everyone["left_rate_interval"] == rate_interval(np.array([1.0, 0, 1, 0, 1]), decided)
    assert everyone["longer_interval"] == rate_interval(np.array([1, 0, 1, 0, 0.5]), decided)
    assert everyone["judge_interval"] == rate_interval(np.array([1.0, 0, 1]), ["q1", "q3", "q1"])
    assert results(VOTES[:1])[0]["win_rate_interval"] is None  # of one prompt


def test_the_form_model_is_asked_about_the_texts_of_the_votes():
    form_model = {"log_characters": 0.3, "questions": -1.0, "commas": 0.2}
    decided = [VOTES[number] for number in (0, 1, 2, 6, 7)]
    margins = form_margins(form_model, form_differences(*([each[side] for each in decided] for side in SIDES_OF_PAIR)))
    assert results(VOTES, form_model)[-1]["form"] == np.mean(margins > 0)


def test_nothing_to_count_is_none():
    (skipped,) = results([vote("skip"), vote("skip", prompt="other")], FORM, [1.0, 1.0])
    names = ("win_rate", "left_rate", "longer", "form", "judge")
    assert shares(skipped, *names, *(f"{name}_interval" for name in names)) == [None] * 10
    assert shares(skipped, "votes", "skip", "longer_n", "form_n", "judge_n") == [2, 2, 0, 0, 0]
    (tied,) = results([vote("tie"), vote("both bad", prompt="other")], FORM)
    assert shares(tied, *names) == [0.5, None, None, None, None]
    (unasked,) = results([vote("left")])
    assert shares(unasked, "form", "form_n", "judge", "judge_n", "longer", "longer_n") == [None, 0, None, 0, 1, 1]
    assert results([]) == []


def test_every_pair_of_models_is_a_contest_of_its_own():
    votes = [vote("left", models=("n", "m")), vote("left", models=("o", "m")), vote("right", "Bo", models=("m", "n"))]
    rows = results(votes, judged=[1.0, -1.0, np.nan])
    assert [shares(row, "model", "other", "voter", "wins", "losses", "judge") for row in rows] == [
        ["m", "n", "Ada", 0, 1, 1.0],
        ["m", "n", "Bo", 0, 1, None],
        ["m", "n", None, 0, 2, 1.0],
        ["m", "o", "Ada", 0, 1, 0.0],
    ]


def test_prompts_that_somebody_has_voted_on():
    votes = [vote("left", "Ada", "q1"), vote("skip", "Ada", "q2"), vote("left", "Bo", "q3")]
    assert seen_prompts(votes, "Ada") == seen_prompts([vote("tie", "Cy", q) for q in (" q2", "q1")], "Cy")
    assert not seen_prompts(votes, "Cy")


# --- the judge -------------------------------------------------------------------------------------------------------


class Lengths:
    """A reward model that likes long answers; it remembers what it was asked."""

    members = ()  # no template that could refuse a prompt

    def __init__(self):
        self.asked = []

    def get_reward_scores(self, prompts, responses):
        assert len(prompts) == len(responses)
        self.asked += [(prompt[0]["content"], response) for prompt, response in zip(prompts, responses, strict=True)]
        return [float(len(response)) for response in responses]


def decided_and_others() -> list[dict]:
    return [
        vote(choice, prompt=f"q{number}", texts=("abc" * number, "x"))
        for number, choice in enumerate(["left", "tie", "right", "both bad", "skip", "left"], start=1)
    ]


def test_the_judge_is_asked_about_decided_votes_once():
    votes, evaluator, known = decided_and_others(), Lengths(), {}
    first = judge_votes(evaluator, votes, known)
    assert np.array_equal(first, [3 - 1, np.nan, 1 - 9, np.nan, np.nan, 18 - 1], equal_nan=True)
    assert sorted(evaluator.asked) == sorted(
        [("q1", "abc"), ("q1", "x"), ("q3", "x"), ("q3", "abc" * 3), ("q6", "abc" * 6), ("q6", "x")]
    )
    more = [*votes, vote("left", prompt="q1", texts=("abc", "x")), vote("right", prompt="q1", texts=("abc", "x"))]
    evaluator.asked.clear()
    assert np.array_equal(judge_votes(evaluator, more, known), [*first, 2, -2], equal_nan=True)
    assert evaluator.asked == [("q1", "x"), ("q1", "abc")]  # the last one is of the other answer
    evaluator.asked.clear()
    judge_votes(evaluator, more, known)
    assert not evaluator.asked


def test_a_vote_that_the_template_refuses_keeps_the_judge_from_no_other(tmp_path, tiny_reward_model):
    refusing = refuse_system_turns(tiny_reward_model, tmp_path / "refusing")
    refused = vote("left", prompt="q1", texts=("Red.", "Seven."))
    refused["prompt"] = [{"role": "system", "content": "Be brief."}, *refused["prompt"]]
    margins = judge_votes(RewardModelEvaluator(refusing, "cpu"), [refused, vote("left", prompt="q2")], {})
    assert np.isnan(margins).tolist() == [True, False]


def test_the_judge_is_asked_about_the_latest_votes_first():
    votes, evaluator, known = decided_and_others(), Lengths(), {}
    assert np.isnan(judge_votes(evaluator, votes, known, most=0)).all() and not evaluator.asked
    for judged in ([5], [2, 5], [0, 2, 5]):
        assert np.flatnonzero(np.isfinite(judge_votes(evaluator, votes, known, most=1))).tolist() == judged
    assert np.isfinite(judge_votes(evaluator, votes, {}, most=2)).nonzero()[0].tolist() == [2, 5]
    assert np.isfinite(judge_votes(evaluator, votes, {}, most=9)).nonzero()[0].tolist() == [0, 2, 5]
    evaluator.asked.clear()
    assert np.isfinite(judge_votes(evaluator, votes, known, most=0)).sum() == 3 and not evaluator.asked


def test_a_vote_like_an_earlier_one_is_among_the_latest():
    """Two people vote on the same answers of files."""
    votes = [vote("left", "Ada", "q1"), vote("left", "Ada", "q2"), vote("left", "Bo", "q1")]
    assert np.isfinite(judge_votes(Lengths(), votes, {}, most=1)).tolist() == [True, False, True]


def test_the_judge_says_what_the_evaluator_says(tiny_reward_model):
    votes, evaluator = decided_and_others(), RewardModelEvaluator(tiny_reward_model, "cpu")
    judged = judge_votes(evaluator, votes, {})
    for each, margin in zip(votes, judged, strict=True):
        chosen, rejected = (
            evaluator.get_reward_score(each["prompt"], each[side][0]["content"]) for side in SIDES_OF_PAIR
        )
        assert margin == pytest.approx(chosen - rejected, abs=1e-5) or each["vote"] not in ("left", "right")
    assert np.isfinite(judged).tolist() == [True, False, True, False, False, True]


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": []},
        {"prompt": said("q", "narrator")},
        {"prompt": said("q")},
        {"chosen": said(" ")},
    ],
    ids=["no turns", "unknown role", "answered already", "empty answer"],
)
def test_an_edited_line_keeps_the_judge_from_no_other_vote(tmp_path, tiny_reward_model, change):
    (tmp_path / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (GOOD, {**GOOD, **change})))
    votes, _ = read_votes(tmp_path / "votes.jsonl")
    judged = judge_votes(RewardModelEvaluator(tiny_reward_model, "cpu"), votes, {})
    assert np.isfinite(judged[0])


# --- as training data ------------------------------------------------------------------------------------------------


def test_votes_become_pairs_with_their_authors(tmp_path, monkeypatch, tiny_model):
    monkeypatch.setattr("reward_pipeline.plots.plot_lengths", lambda *rest: None)
    choices = ["left", "right", "tie", "left", "both bad", "right", "skip", "left", "right", "skip"]
    for number, choice in enumerate(choices):
        texts = (f"The {number} on the left is right.", f"{number}, says the right one.")
        append_vote(tmp_path / "votes.jsonl", vote(choice, "Ada", f"Name the number {number}.", texts, category="n"))
    run_main(
        "load_helpsteer_dataset", monkeypatch, "--source", tmp_path / "votes.jsonl", "--model", tiny_model,
        "--output", tmp_path / "out", "--max_length", "64", "--validation_share", "0.3",
    )  # fmt: skip
    rows = json.loads((tmp_path / "out" / "metadata.json").read_text())["rows"]
    assert rows["dropped"] == {"tie": 1, "both answers are bad": 1, "vote was skipped": 2}
    assert (rows["read"], rows["kept"]) == (10, 6)
    pairs = concatenate_datasets([*load_from_disk(str(tmp_path / "out")).values()])
    found = {
        (row["prompt"][0]["content"], row["chosen"][0]["content"], row["chosen_author"], row["rejected_author"])
        for row in pairs
    }
    assert found == {
        *((f"Name the number {n}.", f"The {n} on the left is right.", "m", "n") for n in (0, 3, 7)),
        *((f"Name the number {n}.", f"{n}, says the right one.", "n", "m") for n in (1, 5, 8)),
    }
    assert set(pairs["category"]) == {"n"}
