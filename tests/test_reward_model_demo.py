"""The script ranks what it is given, and says in one line what it can not."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import names_of, parse, run_main

from reward_pipeline import RewardModelEvaluator, models


@pytest.fixture(scope="module")
def evaluator(tiny_reward_model):
    return RewardModelEvaluator(tiny_reward_model)


def run(monkeypatch, model, *arguments):
    run_main("reward_model_demo", monkeypatch, "--model", model, *arguments)


def test_the_demonstration_compares_answers_to_one_prompt(monkeypatch, evaluator, tiny_reward_model, tmp_path, capsys):
    shutil.copytree(tiny_reward_model, tmp_path / "model")
    (tmp_path / "model" / "metrics.json").write_text(json.dumps({"source": "sample pairs of this project"}))
    run(monkeypatch, tmp_path / "model")
    result = json.loads((tmp_path / "model" / "demonstration.json").read_text())
    comparisons = names_of("reward_model_demo")["COMPARISONS"]
    assert [each["prompt"] for each in result["comparisons"]] == [prompt for prompt, _ in comparisons]
    for shown, (prompt, responses) in zip(result["comparisons"], comparisons, strict=True):
        ranking = [(entry["response"], entry["reward"]) for entry in shown["ranking"]]
        assert ranking == evaluator.compare_responses(prompt, responses)
    printed = capsys.readouterr().out
    assert "Париж" in printed and "the sample pairs of this project alone" in printed


@pytest.mark.parametrize(
    "written, alone",
    [
        ({"source": "sample pairs of this project"}, True),
        ({"source": "stream of sample pairs of this project"}, True),
        ({"source": "local file mine.jsonl + sample pairs of this project"}, False),
        ({"source": None}, False),
        ({}, False),
        ([], False),
        (None, False),
    ],
)
def test_which_models_have_seen_the_sample_alone(tmp_path, written, alone):
    if written is not None:
        (tmp_path / "metrics.json").write_text(json.dumps(written))
    assert names_of("reward_model_demo")["trained_on_sample"](tmp_path) == alone


def test_a_model_of_the_hub_is_used_and_left_as_it_is(monkeypatch, evaluator, tiny_reward_model, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    model = Path(shutil.copytree(tiny_reward_model, tmp_path / "snapshot"))
    (model / "metrics.json").write_text(json.dumps({"source": "sample pairs of this project"}))
    monkeypatch.setattr(models, "resolve_model", lambda name: models.ModelSource(str(model), f"hub {name}"))
    before = sorted(tmp_path.rglob("*"))
    run(monkeypatch, "some/judge")
    assert sorted(tmp_path.rglob("*")) == before
    printed = capsys.readouterr().out
    assert "the sample pairs of this project alone" in printed and "written to" not in printed
    run(monkeypatch, "some/judge", "--output", "result.json")
    first = json.loads(Path("result.json").read_text())["comparisons"][0]
    best = evaluator.best_of_n(first["prompt"], [each["response"] for each in first["ranking"]])
    assert first["ranking"][0] == {"response": best[0], "reward": pytest.approx(best[1], abs=1e-5)}


def test_prompt_and_responses(monkeypatch, evaluator, tiny_reward_model, tmp_path, capsys):
    run(monkeypatch, tiny_reward_model, "--prompt", "Hi", "--responses", "a", "b", "--output", tmp_path / "r.json")
    ranking = json.loads((tmp_path / "r.json").read_text())["ranking"]
    assert [(entry["response"], pytest.approx(entry["reward"], abs=1e-5)) for entry in ranking] == [
        (response, score) for response, score in evaluator.compare_responses("Hi", ["a", "b"])
    ]
    printed = capsys.readouterr().out
    assert f"{ranking[0]['reward']:+.3f}" in printed and "sample pairs" not in printed


def test_bytes_that_are_not_text_are_ranked_and_printed(monkeypatch, tiny_reward_model, capsys):
    run(monkeypatch, tiny_reward_model, "--prompt", "caf\udce9", "--responses", "a", "\udcff")
    assert "> caf?" in capsys.readouterr().out


def test_a_file_is_scored(monkeypatch, evaluator, tiny_reward_model, write_jsonl, tmp_path, capsys):
    source = write_jsonl([{"prompt": "Hi", "response": "a"}])
    run(monkeypatch, tiny_reward_model, "--file", source, "--output", tmp_path / "scores.jsonl")
    scored = json.loads((tmp_path / "scores.jsonl").read_text())
    expected = pytest.approx(evaluator.get_reward_score("Hi", "a"), abs=1e-5)
    assert scored == {"prompt": "Hi", "response": "a", "reward": expected}
    assert f"1 rows of local file {source} scored" in capsys.readouterr().out


def test_a_source_is_found_before_the_model(monkeypatch, tmp_path):
    flags = ("--file", "missing.jsonl", "--output", tmp_path / "scores.jsonl")
    with pytest.raises(SystemExit, match=r"error: missing\.jsonl: no such file or directory"):
        run(monkeypatch, tmp_path / "nothing", *flags)
    with pytest.raises(SystemExit, match=r"error: sample: files have no splits; leave --split test out"):
        run(monkeypatch, tmp_path / "nothing", "--file", "sample", "--split", "test", *flags[2:])


def test_the_form_term_is_added_where_the_training_had_it(monkeypatch, evaluator, tiny_reward_model, tmp_path):
    flags = ("--prompt", "Hi", "--responses", "a", "b!", "--output", tmp_path / "ranking.json", "--form", "true")
    with pytest.raises(SystemExit, match=r"error: .*was trained without the form term; leave form out"):
        run(monkeypatch, tiny_reward_model, *flags)
    model = shutil.copytree(tiny_reward_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"form_model": {"exclamations": 9.0}, "form_term": True}))
    run(monkeypatch, str(model), *flags)
    first, second = json.loads((tmp_path / "ranking.json").read_text())["ranking"]
    assert (first["response"], second["response"]) == ("b!", "a")
    assert first["reward"] == pytest.approx(evaluator.get_reward_score("Hi", "b!") + 9 * math.log(2), abs=1e-4)
    assert second["reward"] == pytest.approx(evaluator.get_reward_score("Hi", "a"), abs=1e-4)


def test_a_missing_model_is_one_line(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*run train_reward_model\.py first"):
        run(monkeypatch, tmp_path / "nothing")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", "a"], "--prompt and --responses: go together"),
        (["--responses", "a"], "--prompt and --responses: go together"),
        (["--prompt", "a\n<extra_id_1>Assistant\nb", "--responses", "c"], "--prompt: .* must end with a user turn"),
        (["--file", "in.jsonl"], "--file: goes with --output"),
        (["--file", "in.jsonl", "--output", "o", "--prompt", "a", "--responses", "b"], "--file: .*without --prompt"),
        (["--file", "once", "--output", "o"], "--file: once can be read only once, and is read twice; save it in"),
        (["--split", "test"], "--split: goes with --file"),
        (["--file", "parts", "--output", "parts/new/o.jsonl"], "--output: must lie outside of --file parts"),
        (["--file", "in.jsonl", "--output", "."], "--output: . is a directory; name a file"),
        (["--file", "in.jsonl", "--output", "./in.jsonl"], "--output: must be another file than --file"),
        (["--file", "in.jsonl", "--output", "link.jsonl"], "--output: must be another file than --file"),
        (["--model", ""], "--model: must not be empty"),
        (["--prompt", "a", "--responses", "b", " "], "--responses: must not be empty"),
        (["--mixed_precision", "maybe"], "--mixed_precision: must be true or false"),
        (["--nonsense"], "--nonsense: unknown flag"),
    ],
)
def test_wrong_flags_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text("")
    (tmp_path / "link.jsonl").symlink_to("in.jsonl")
    (tmp_path / "parts").mkdir()
    os.mkfifo(tmp_path / "once")
    with pytest.raises(SystemExit) as ended:
        parse("reward_model_demo", *arguments)
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: {message}", line)
