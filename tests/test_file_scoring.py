"""Every row of a source gets its rewards, or the source is refused with the place of what is wrong."""

import datetime
import gzip
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import USER
from test_layouts import BAD, GOOD, GREETING, PUBLISHED

from reward_pipeline import InputError, RewardModelEvaluator, file_scoring
from reward_pipeline.evaluator import check_templates
from reward_pipeline.file_scoring import score_file
from reward_pipeline.files import sole_writer
from reward_pipeline.sources import open_source

TEXTS = (GOOD, BAD, "-")  # all answers of `PUBLISHED`


@pytest.fixture(scope="module")
def evaluator(tiny_reward_model):
    return RewardModelEvaluator(tiny_reward_model, device="cpu")


def score(evaluator, source, target: Path) -> list[dict]:
    """The rows that scoring a source gives."""
    score_file(evaluator, open_source(str(source)), target)
    return [json.loads(line) for line in target.read_text().splitlines()]


def test_a_file_is_scored_row_by_row(monkeypatch, evaluator, write_jsonl, tmp_path):
    monkeypatch.setattr(file_scoring, "CHUNK", 2)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "b"}]
    rows = [
        {"prompt": "Hi", "response": "a", "id": 7},
        {"prompt": "Hi", "responses": ["a", "b", "ё"]},
        {"prompt": "Hi", "chosen": "a", "rejected": messages},
        {"prompt": "Hi", "responses": []},
        {"prompt": "Hi", "response": "a", "note": "\ud800"},
    ]
    source = write_jsonl(rows[:4])
    with open(source, "a") as file:
        file.write(json.dumps(rows[4]) + "\n")
    assert score_file(evaluator, open_source(source), tmp_path / "new" / "scores.jsonl") == 5
    scored = [json.loads(line) for line in (tmp_path / "new" / "scores.jsonl").read_text().splitlines()]
    a, b, yo = (evaluator.get_reward_score("Hi", text) for text in ("a", "b", "ё"))
    assert scored == [
        {**rows[0], "reward": pytest.approx(a, abs=1e-5)},
        {**rows[1], "rewards": pytest.approx([a, b, yo], abs=1e-5)},
        {**rows[2], "chosen_reward": pytest.approx(a, abs=1e-5), "rejected_reward": pytest.approx(b, abs=1e-5)},
        {**rows[3], "rewards": []},
        {**rows[4], "reward": pytest.approx(a, abs=1e-5), "note": "?"},
    ]


def test_the_turns_before_an_answer_are_its_context(evaluator, write_jsonl, tmp_path):
    user, assistant = ({"role": role, "content": role} for role in ("user", "assistant"))
    answer = {"role": "assistant", "content": "a"}
    source = write_jsonl([{"prompt": "user", "responses": [[assistant, user, answer], [user, answer]]}])
    rewards = score(evaluator, source, tmp_path / "scores.jsonl")[0]["rewards"]
    expected = [evaluator.get_reward_score(prompt, "a") for prompt in ([user, assistant, user], "user")]
    assert rewards == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "row 2: not valid JSON"),
        (b"\xff", "row 2: not valid UTF-8"),
        ("[" * 10**5, "row 2: not valid JSON"),
        ('{"response": "a", "id": 1}', "row 2: needs prompt, .* but has response, id"),
        ('{"prompt": "a"}', "row 2: needs prompt, .* but has prompt"),
        ('{"prompt": "a", "response": null}', "row 2: needs prompt, .* but has prompt"),
        ("{}", "row 2: needs prompt, .* but has nothing"),
        ("[]", "row 2: not an object with named columns"),
        ('{"prompt": "a", "responses": "text"}', "row 2: responses is not a list"),
        ('{"prompt": "a", "responses": ["b", " "]}', r"row 2: responses\[1\] is empty"),
        ('{"prompt": "a", "response": ""}', "row 2: response is empty, and a reward for no answer means nothing"),
        ('{"prompt": "a", "chosen": "b", "rejected": "\\n"}', "row 2: rejected is empty"),
        ('{"prompt": "a", "chosen": "b", "rejected": null}', "row 2: needs prompt, .* but has prompt, chosen"),
        ('{"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": 0}', "row 2: tie"),
        ('{"prompt": [], "response": "a"}', "row 2: the prompt has no messages"),
        (
            '{"prompt": "a", "response": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}',
            r"row 2: the response answers \[user: 'b'\], but the prompt is \[user: 'a'\]",
        ),
    ],
)
def test_a_bad_line_is_named_and_nothing_written(evaluator, tmp_path, line, message):
    source = tmp_path / "in.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    source.write_bytes(b'{"prompt": "a", "response": "b"}\n' + line + b"\n")
    with pytest.raises(InputError, match=message):
        score_file(evaluator, open_source(str(source)), tmp_path / "new" / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_the_bar_moves_with_every_batch(evaluator, tiny_reward_model, write_jsonl, tmp_path, monkeypatch):
    moves = []

    class Bar(file_scoring.tqdm):
        def update(self, n=1):
            moves.append((n, self.total))
            return super().update(n)

    monkeypatch.setattr(file_scoring, "tqdm", Bar)
    source = write_jsonl([{"prompt": "Hi", "responses": [f"answer {number}" for number in range(40)]}])
    score_file(evaluator, open_source(source), tmp_path / "scores.jsonl")
    assert moves == [(16, 40), (16, 40), (8, 40)]
    moves.clear()
    ensemble = RewardModelEvaluator([tiny_reward_model, tiny_reward_model], device="cpu")
    score_file(ensemble, open_source(source), tmp_path / "scores.jsonl")
    assert moves == [(16, 80), (16, 80), (8, 80)] * 2


def test_a_prompt_that_the_template_refuses_is_named(tiny_reward_model, write_jsonl, tmp_path):
    """Some templates take no system turns, as Gemma's."""
    directory = tmp_path / "refusing"
    shutil.copytree(tiny_reward_model, directory)
    template = directory / "chat_template.jinja"
    found = "'system' in messages | map(attribute='role') | list"
    refusal = f"{{% if {found} %}}{{{{ raise_exception('no system turns') }}}}{{% endif %}}"
    template.write_text(refusal + template.read_text())
    evaluator = RewardModelEvaluator(directory, device="cpu")
    marked = "<extra_id_0>System\nBe brief.\n<extra_id_1>User\nHi"
    source = write_jsonl([{"prompt": "Hi", "response": "a"}, {"prompt": marked, "response": "a"}])
    with pytest.raises(
        InputError, match=f"{source} row 2: {directory} can not read it: the chat template refuses.*no system turns"
    ):
        score_file(evaluator, open_source(source), tmp_path / "scores.jsonl")
    assert not (tmp_path / "scores.jsonl").exists()
    turns = [{"role": role, "content": "b"} for role in ("assistant", "system", "user", "assistant")]
    source = write_jsonl([{"prompt": "Hi", "response": turns}])
    with pytest.raises(InputError, match=f"{source} row 1: .*no system turns"):
        score_file(evaluator, open_source(source), tmp_path / "scores.jsonl")
    with pytest.raises(InputError, match=r"^prompt: "):
        check_templates(evaluator, ["Hi", marked], ["other", "prompt"])


def test_an_empty_file_is_refused(evaluator, tmp_path):
    (tmp_path / "in.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match=r"in\.jsonl: has no rows"):
        score(evaluator, tmp_path / "in.jsonl", tmp_path / "out.jsonl")


# --- other sources ---------------------------------------------------------------------------------------------------


def test_the_container_does_not_matter(evaluator, write_jsonl, tmp_path):
    rows = [{"prompt": f"Say {number}.", "response": f"{number}!"} for number in range(5)]
    expected = score(evaluator, write_jsonl(rows), tmp_path / "scores.jsonl")
    assert [row["reward"] for row in expected] == pytest.approx(
        evaluator.get_reward_scores([row["prompt"] for row in rows], [row["response"] for row in rows]), abs=1e-5
    )
    directory = tmp_path / "parts"
    directory.mkdir()
    pd.DataFrame(rows).to_csv(tmp_path / "rows.csv", index=False)
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    for name, part in {"a": rows[:2], "b": rows[2:]}.items():
        with gzip.open(directory / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in part)
    for source in ("rows.csv", "rows.parquet", "parts"):
        scored = score(evaluator, tmp_path / source, tmp_path / "other.jsonl")
        for row, wanted in zip(scored, expected, strict=True):
            assert row == wanted | {"reward": pytest.approx(wanted["reward"], abs=1e-5)}


def test_columns_that_are_empty_in_some_rows(evaluator, tmp_path):
    """As tables have them; what JSON does not know becomes text."""
    day = datetime.date(2026, 1, 2)
    rows = [
        {"prompt": "Hi", "response": "a", "day": day},
        {"prompt": "Hi", "responses": ["b", "c"]},
        {"prompt": "Hi", "chosen": "d", "rejected": "e"},
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    one, several, pair = score(evaluator, tmp_path / "rows.parquet", tmp_path / "scores.jsonl")
    rewards = [one["reward"], *several["rewards"], pair["chosen_reward"], pair["rejected_reward"]]
    assert rewards == pytest.approx(evaluator.get_reward_scores(["Hi"] * 5, list("abcde")), abs=1e-5)
    assert (one["day"], pair["day"]) == ("2026-01-02", None)


def test_published_layouts_are_scored(evaluator, write_jsonl, tmp_path):
    asked = {True: [*GREETING, USER], False: [USER]}
    reward = {(greeted, text): evaluator.get_reward_score(asked[greeted], text) for greeted in asked for text in TEXTS}
    scored = score(evaluator, write_jsonl([row for _, row, _ in PUBLISHED]), tmp_path / "scores.jsonl")
    for (_, row, greeted), got in zip(PUBLISHED, scored, strict=True):
        assert row.keys() <= got.keys()
        if "responses" in row:  # scored as they stand, ratings or not
            assert got["rewards"] == pytest.approx([reward[greeted, text] for text in row["responses"]], abs=1e-5)
        else:
            sides = got["chosen_reward"], got["rejected_reward"]
            assert sides == pytest.approx((reward[greeted, GOOD], reward[greeted, BAD]), abs=1e-5)


def test_a_ranking_becomes_a_row_a_pair(evaluator, write_jsonl, tmp_path):
    source = write_jsonl([{"question": "Hi", "generations": ["a", "b", "c"], "ratings": [1, 3, 2]}])
    rows = score(evaluator, source, tmp_path / "scores.jsonl")
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("b", "c"), ("b", "a"), ("c", "a")]
    assert rows[0]["rejected_reward"] == pytest.approx(rows[2]["chosen_reward"], abs=1e-5)


def test_of_two_that_write_one_file_the_second_is_refused(evaluator, write_jsonl, tmp_path):
    source, target = write_jsonl([{"prompt": "Hi", "response": "a"}]), tmp_path / "scores.jsonl"
    lock = target.with_name(".scores.jsonl.lock")
    with sole_writer(target, lock), pytest.raises(InputError, match=r"scores\.jsonl: another run is writing it"):
        score(evaluator, source, target)
    assert len(score(evaluator, source, target)) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl", "scores.jsonl"}
