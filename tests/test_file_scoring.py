"""Every line of a file gets its rewards, or the file is refused with the place of what is wrong."""

import json
import shutil
from pathlib import Path

import pytest

from reward_pipeline import InputError, RewardModelEvaluator, file_scoring
from reward_pipeline.evaluator import check_templates
from reward_pipeline.file_scoring import score_file


@pytest.fixture(scope="module")
def evaluator(tiny_reward_model):
    return RewardModelEvaluator(tiny_reward_model, device="cpu")


def test_a_file_is_scored_line_by_line(monkeypatch, evaluator, write_jsonl, tmp_path):
    monkeypatch.setattr(file_scoring, "LINES", 2)
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
    assert score_file(evaluator, Path(source), tmp_path / "new" / "scores.jsonl") == 5
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
    score_file(evaluator, Path(source), tmp_path / "scores.jsonl")
    expected = [evaluator.get_reward_score(prompt, "a") for prompt in ([user, assistant, user], "user")]
    assert json.loads((tmp_path / "scores.jsonl").read_text())["rewards"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "row 2: not valid JSON"),
        (b"\xff", "row 2: not UTF-8 text; convert the file first"),
        ("[" * 10**5, "row 2: nested too deeply"),
        ('{"response": "a"}', "row 2: needs prompt"),
        ('{"prompt": "a"}', "row 2: needs prompt"),
        ('{"prompt": "a", "response": null}', "row 2: needs prompt"),
        ("[]", "row 2: needs prompt"),
        ('{"prompt": "a", "responses": "text"}', "responses is not a list"),
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
        score_file(evaluator, source, tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_the_bar_moves_with_every_batch(evaluator, write_jsonl, tmp_path, monkeypatch):
    moves = []

    class Bar(file_scoring.tqdm):
        def update(self, n=1):
            moves.append((n, self.total))
            return super().update(n)

    monkeypatch.setattr(file_scoring, "tqdm", Bar)
    source = write_jsonl([{"prompt": "Hi", "responses": [f"answer {number}" for number in range(40)]}])
    score_file(evaluator, Path(source), tmp_path / "scores.jsonl")
    assert moves == [(16, 40), (16, 40), (8, 40)]


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
        score_file(evaluator, Path(source), tmp_path / "scores.jsonl")
    assert not (tmp_path / "scores.jsonl").exists()
    turns = [{"role": role, "content": "b"} for role in ("assistant", "system", "user", "assistant")]
    source = write_jsonl([{"prompt": "Hi", "response": turns}])
    with pytest.raises(InputError, match=f"{source} row 1: .*no system turns"):
        score_file(evaluator, Path(source), tmp_path / "scores.jsonl")
    with pytest.raises(InputError, match=r"^prompt: "):
        check_templates(evaluator, ["Hi", marked], ["other", "prompt"])


def test_an_empty_file_is_refused(evaluator, tmp_path):
    (tmp_path / "in.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="the file is empty"):
        score_file(evaluator, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
