import csv
import json
import shutil

import numpy as np
import pytest
from conftest import make_pairs, parse, run_main

from reward_pipeline.evaluator import RewardModelEvaluator
from reward_pipeline.files import rounded
from reward_pipeline.pair_metrics import pair_metrics, score_pairs
from reward_pipeline.processed import read_pairs


@pytest.fixture(scope="module")
def processed(tmp_path_factory, tiny_model) -> str:
    """A small processed dataset: 32 training and 8 validation pairs."""
    directory = tmp_path_factory.mktemp("data")
    source, output = directory / "easy.jsonl", directory / "processed"
    source.write_text("".join(json.dumps(row) + "\n" for row in make_pairs(40)))
    with pytest.MonkeyPatch.context() as patch:
        run_main(
            "load_helpsteer_dataset", patch, "--source", source, "--model", tiny_model, "--output", output,
            "--max_length", "64",
        )  # fmt: skip
    return str(output)


def evaluate(monkeypatch, output, *arguments) -> dict:
    run_main("evaluate_reward_model", monkeypatch, "--output", output, *arguments)
    return json.loads((output / "metrics.json").read_text())


def test_files_and_total(monkeypatch, tiny_reward_model, processed, write_jsonl, tmp_path, capsys):
    rows = [{**pair, "category": "numbers", "chosen_rating": 3.0, "rejected_rating": 1.0} for pair in make_pairs(6)]
    source, output = write_jsonl([*rows, {"prompt": "broken"}]), tmp_path / "out"
    arguments = ("--model", tiny_reward_model, "--pairs", source, processed, "--full_precision")
    results = evaluate(monkeypatch, output, *arguments)
    assert results.keys() == {"models", "precision", "members", "files", "total"}
    assert {name: each["n"] for name, each in results["files"].items()} == {source: 6, processed: 8}
    assert results["total"]["n"] == 14
    assert results["files"][source]["by_category"][0]["group"] == "numbers"
    assert results["files"][processed]["by_category"] == []
    printed = capsys.readouterr().out
    for words in (
        "1 of 7 pairs can not be used (1: missing column chosen",
        "total",
        "numbers",
        "prompts shuffled among the pairs",
        "scored in float32",
    ):
        assert words in printed
    assert (output / "report.txt").read_text().strip() in printed
    assert (output / "mistakes.md").read_text().startswith("# Worst mistakes")
    plots = {path.name for path in (output / "plots").iterdir()}
    assert plots == {
        *("margins.png", "reliability.png", "reward_against_length.png", "accuracy_by_length.png"),
        *("accuracy_by_rating_gap.png", "accuracy_by_category.png"),
    }

    evaluator = RewardModelEvaluator(tiny_reward_model)  # in fp32, as `--full_precision`
    with (output / "rewards.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 14 and lines[5]["place"] == f"{source} row 6"
    for pair, line in zip(rows, lines, strict=False):
        assert {side: line[side] for side in ("prompt", "chosen", "rejected")}.items() <= pair.items()
        for side in ("chosen", "rejected"):
            score = evaluator.get_reward_score(pair["prompt"], pair[side])
            assert float(line[f"{side}_reward"]) == pytest.approx(score, abs=1e-5)
    right = np.mean([float(line["chosen_reward"]) > float(line["rejected_reward"]) for line in lines])
    assert results["total"]["accuracy"] == pytest.approx(right, abs=1e-4)
    own = np.mean([float(line["chosen_reward"]) > float(line["other_reward"]) for line in lines])
    assert (results["total"]["own_prompt_n"], results["total"]["shuffled_prompt_n"]) == (14, 14)
    assert results["total"]["own_prompt_accuracy"] == pytest.approx(own, abs=1e-4)


def test_a_model_that_knows_its_form_model_is_compared_with_it(
    monkeypatch, tiny_reward_model, write_jsonl, tmp_path, capsys
):
    rows = [{**pair, "chosen": pair["chosen"] + "!" * (number < 9)} for number, pair in enumerate(make_pairs(12))]
    source, model = write_jsonl(rows), shutil.copytree(tiny_reward_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"form_model": {"exclamations": 1.0}}))
    figures = evaluate(monkeypatch, tmp_path / "out", "--model", model, "--pairs", source)["total"]
    assert figures["form_wins"] == (9 + 3 / 2) / 12
    assert figures["gain_over_form"] == pytest.approx(figures["accuracy"] - figures["form_wins"], abs=1e-4)
    header, _, row = capsys.readouterr().out.split("form model", 1)[1].splitlines()[:3]
    assert "where it is wrong" in header and "0.875" in row
    evaluate(monkeypatch, tmp_path / "without", "--model", tiny_reward_model, "--pairs", source)
    assert "form model" not in capsys.readouterr().out

    term = {"form_model": {"exclamations": 100.0}, "form_term": True}  # what the reward says is nothing beside it
    (model / "config.json").write_text(json.dumps(config | term))
    figures = evaluate(monkeypatch, tmp_path / "with", "--model", model, "--pairs", source)["total"]
    with (tmp_path / "with" / "rewards.csv").open(newline="") as file:
        right = [float(line["chosen_reward"]) > float(line["rejected_reward"]) for line in csv.DictReader(file)]
    assert figures["with_form"]["accuracy"] == pytest.approx((9 + sum(right[9:])) / 12, abs=1e-4)
    assert f"{figures['with_form']['accuracy']:.3f} (" in capsys.readouterr().out.split("with the form term", 1)[1]


def test_columns_named_by_the_user_are_read(monkeypatch, tiny_reward_model, processed, write_jsonl, tmp_path):
    rows = [{"asked": pair["prompt"], "best": pair["chosen"], "worst": pair["rejected"]} for pair in make_pairs(3)]
    arguments = ("--model", tiny_reward_model, "--columns", "prompt=asked", "chosen=best", "rejected=worst", "--pairs")
    assert evaluate(monkeypatch, tmp_path / "out", *arguments, write_jsonl(rows))["total"]["n"] == 3
    with pytest.raises(SystemExit, match="holds prepared data, whose columns are known; leave --columns out"):
        evaluate(monkeypatch, tmp_path / "other", *arguments, processed)


def test_several_models_are_an_ensemble(
    monkeypatch, tiny_reward_model, other_reward_model, write_jsonl, tmp_path, capsys
):
    source = write_jsonl(make_pairs(12))
    models = [tiny_reward_model, other_reward_model]
    together = evaluate(monkeypatch, tmp_path / "both", "--model", *models, "--pairs", source)
    assert "member" in capsys.readouterr().out
    pairs = read_pairs(source)
    alone = [RewardModelEvaluator(model, mixed_precision=True) for model in models]
    apart = [rounded(pair_metrics(score_pairs(evaluator, pairs, source)[0])) for evaluator in alone]
    for model, metrics in zip(models, apart, strict=True):
        for figure in ("n", "accuracy", "accuracy_interval"):
            assert together["members"][model][figure] == metrics[figure]
    margins = [metrics["mean_margin"] for metrics in apart]
    assert together["total"]["mean_margin"] == pytest.approx(np.mean(margins), abs=1e-4)
    assert margins[0] != pytest.approx(margins[1], abs=1e-2)


def test_an_evaluation_replaces_only_an_evaluation(monkeypatch, tiny_reward_model, write_jsonl, tmp_path):
    source, output = write_jsonl(make_pairs(3)), tmp_path / "out"
    (output / "plots").mkdir(parents=True)
    for name in ("metrics.json", "rewards.csv", "mistakes.md", "report.txt", "plots/old.png"):
        (output / name).write_text("of an earlier one")
    assert evaluate(monkeypatch, output, "--model", tiny_reward_model, "--pairs", source)["total"]["n"] == 3
    assert not (output / "plots" / "old.png").exists()
    (output / "config.json").write_text("of a model that was trained here")
    before = sorted(output.rglob("*"))
    with pytest.raises(SystemExit, match=r"holds other files \(config\.json\)"):
        evaluate(monkeypatch, output, "--model", tiny_reward_model, "--pairs", source)
    assert sorted(output.rglob("*")) == before


def test_nothing_to_evaluate_is_an_error(monkeypatch, tiny_reward_model, write_jsonl, tmp_path):
    source = write_jsonl([{"prompt": "a"}])
    with pytest.raises(SystemExit, match="no usable pair; 1 of 1 pairs: missing column chosen"):
        evaluate(monkeypatch, tmp_path / "out", "--model", tiny_reward_model, "--pairs", source)
    assert not (tmp_path / "out").exists()


def test_splits_and_broken_directories_are_named(monkeypatch, tiny_reward_model, processed, tmp_path):
    with pytest.raises(SystemExit, match="choose one of its splits by --split: train, validation"):
        run_main(
            "evaluate_reward_model", monkeypatch, "--model", tiny_reward_model, "--pairs", processed, "--split", "test"
        )
    broken = shutil.copytree(processed, tmp_path / "broken")
    (broken / "dataset_dict.json").unlink()
    with pytest.raises(SystemExit, match=r"run load_helpsteer_dataset\.py first"):
        run_main("evaluate_reward_model", monkeypatch, "--model", tiny_reward_model, "--pairs", broken)


def test_files_have_no_splits(monkeypatch, tiny_reward_model, write_jsonl):
    source = write_jsonl(make_pairs(3))
    with pytest.raises(SystemExit, match="files have no splits; leave --split test out"):
        run_main(
            "evaluate_reward_model", monkeypatch, "--model", tiny_reward_model, "--pairs", source, "--split", "test"
        )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--model", "a", "a"), "error: --model: names a place twice\n"),
        (("--pairs", "a", "b", "a"), "error: --pairs: names a place twice\n"),
        (("--output", " "), "error: --output: must not be empty\n"),
        (("--full_precision", "perhaps"), "error: --full_precision: must be true or false, not perhaps\n"),
        (("--batch_size", "4"), "error: --batch_size: unknown flag; --help lists all\n"),
    ],
)
def test_wrong_flags_are_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        parse("evaluate_reward_model", *arguments)
    assert (ended.value.code, capsys.readouterr().err) == (1, message)


def test_flags_are_keys_of_a_file_too(tmp_path):
    config = tmp_path / "evaluation.yaml"
    config.write_text("model: [one, two]\nfull_precision: true\n")
    options = parse("evaluate_reward_model", "--config", config, "--pairs", "a.jsonl")
    assert (options.model, options.pairs, options.full_precision) == (["one", "two"], ["a.jsonl"], True)
    assert options.output is None
