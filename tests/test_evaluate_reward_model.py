import csv
import json
import math

import numpy as np
import pytest
from conftest import make_pairs, run_main
from scipy.stats import binomtest, spearmanr
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

import evaluate_reward_model as erm
from reward_model_demo import RewardModelEvaluator


def scored(chosen, rejected, **columns) -> erm.Columns:
    """Columns of N scored pairs; what a test does not care about is filled in."""
    n = len(chosen)
    filled = {
        "pairs": ["file"] * n,
        "place": [f"row {number}" for number in range(n)],
        "prompt_key": list(range(n)),
        "chosen_length": [10] * n,
        "rejected_length": [5] * n,
        "rating_gap": [math.nan] * n,
        "category": [""] * n,
        "prompt_cut": [False] * n,
        "response_cut": [False] * n,
        **columns,
    }
    rewards = {"chosen_reward": np.array(chosen, float), "rejected_reward": np.array(rejected, float)}
    return {name: np.array(values) for name, values in filled.items()} | rewards


def random_columns(n: int = 400, seed: int = 0) -> erm.Columns:
    generator = np.random.default_rng(seed)
    return scored(
        generator.normal(0.4, 1, n),
        generator.normal(0, 1, n),
        chosen_length=generator.integers(1, 500, n),
        rejected_length=generator.integers(1, 500, n),
        prompt_key=generator.integers(0, 150, n),
        rating_gap=generator.choice([0.2, 0.6, 1.4], n),
        category=generator.choice(["code", "maths", ""], n),
    )


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("successes, n", [(0, 5), (5, 5), (3, 10), (870, 1736), (1, 1)])
def test_wilson_interval_agrees_with_scipy(successes, n):
    interval = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert erm.wilson_interval(successes, n) == pytest.approx((interval.low, interval.high), abs=1e-6)


def test_wilson_interval_without_pairs_says_nothing():
    assert erm.wilson_interval(0, 0) == (0.0, 1.0)


def test_metrics_by_hand():
    metrics = erm.pair_metrics(
        scored(
            [2.0, 1.0, 0.0, 3.0],
            [1.0, 1.0, 1.0, -1.0],
            chosen_length=[8, 1, 1, 4],
            rejected_length=[5, 2, 3, 4],
            prompt_key=[7, 7, 8, 9],
            prompt_cut=[True, False, False, False],
            response_cut=[True, True, False, True],
        )
    )
    assert (metrics["n"], metrics["prompts"], metrics["ties"]) == (4, 3, 1)
    assert metrics["accuracy"] == 0.625  # right, tie, wrong, right
    assert metrics["longer_wins"] == 0.375  # right, wrong, wrong, equal
    assert metrics["gain_over_longer_wins"] == 0.25
    assert (metrics["shorter_chosen_n"], metrics["shorter_chosen_accuracy"]) == (2, 0.25)
    assert metrics["shorter_chosen_interval"] == list(erm.wilson_interval(0.5, 2))
    assert metrics["mean_margin"] == 1.0
    assert metrics["reward_mean"] == 1.0
    assert metrics["reward_std"] == pytest.approx(np.sqrt((1 + 0 + 1 + 4 + 0 + 0 + 0 + 4) / 8))
    probability = [1 / (1 + math.exp(-margin)) for margin in (1, 0, -1, 4)]
    assert metrics["brier"] == pytest.approx(sum((1 - p) ** 2 for p in probability) / 4)
    assert metrics["cut_share"] == {"prompt": 0.25, "response": 0.75}


def test_no_pair_with_a_shorter_chosen_answer():
    metrics = erm.pair_metrics(scored([1.0], [0.0]))
    assert (metrics["shorter_chosen_n"], metrics["shorter_chosen_accuracy"]) == (0, None)
    assert metrics["spearman_reward_length"] == pytest.approx(1)
    assert metrics["spearman_margin_length"] is None  # one pair has no ranks


def test_calibration_error_by_hand():
    def logit(p):
        return math.log(p / (1 - p))

    # Confidence 0.62 twice, one of them right; 0.97 once, right; a tie at 0.5.
    bins = erm.reliability(np.array([logit(0.62), -logit(0.62), logit(0.97), 0.0]))
    assert [each["n"] for each in bins] == [1, 2, 1]
    assert [each["confidence"] for each in bins] == pytest.approx([0.5, 0.62, 0.97])
    assert [each["accuracy"] for each in bins] == [0.5, 0.5, 1.0]
    assert erm.calibration_error(bins) == pytest.approx((0 + 2 * 0.12 + 0.03) / 4)


def test_the_highest_confidence_has_a_bin():
    bins = erm.reliability(np.array([800.0, -800.0]))
    assert bins == [{"n": 2, "confidence": 1.0, "accuracy": 0.5}]


def test_calibration_agrees_with_scikit_learn():
    columns = random_columns()
    margins = columns["chosen_reward"] - columns["rejected_reward"]
    metrics = erm.pair_metrics(columns)
    probability = 1 / (1 + np.exp(-margins))
    # sklearn needs both classes: mirror every pair. Its bins are those of [0, 1], ours those of the upper half.
    labels, mirrored = np.repeat([1, 0], len(margins)), np.concatenate([probability, 1 - probability])
    assert metrics["brier"] == pytest.approx(brier_score_loss(labels, mirrored))
    share, confidence = calibration_curve(labels, mirrored, n_bins=2 * erm.CONFIDENCE_BINS)
    upper = confidence > 0.5
    assert [each["accuracy"] for each in metrics["reliability"]] == pytest.approx(share[upper])
    assert [each["confidence"] for each in metrics["reliability"]] == pytest.approx(confidence[upper])


def test_rank_correlations_agree_with_scipy():
    columns = random_columns()
    metrics = erm.pair_metrics(columns)
    rewards = [*columns["chosen_reward"], *columns["rejected_reward"]]
    lengths = [*columns["chosen_length"], *columns["rejected_length"]]
    assert metrics["spearman_reward_length"] == pytest.approx(spearmanr(rewards, lengths).statistic)
    margins = columns["chosen_reward"] - columns["rejected_reward"]
    extra = columns["chosen_length"] - columns["rejected_length"]
    assert metrics["spearman_margin_length"] == pytest.approx(spearmanr(margins, extra).statistic)


def test_intervals_hold_their_estimates_and_repeated_prompts_widen_them():
    columns = random_columns()
    metrics = erm.pair_metrics(columns)
    low, high = metrics["gain_over_longer_wins_interval"]
    assert low < metrics["gain_over_longer_wins"] < high
    # Every pair ten times under the same prompt: n is larger, what is known is not.
    repeated = erm.join_columns([columns] * 10)
    again = erm.pair_metrics(repeated)
    width, width_again = (
        np.diff(each["accuracy_interval_by_prompt"])[0] for each in (erm.pair_metrics(columns), again)
    )
    assert width_again == pytest.approx(width, rel=1e-6)
    assert np.diff(again["accuracy_interval"]) < np.diff(metrics["accuracy_interval"]) / 3
    assert again["accuracy"] == pytest.approx(metrics["accuracy"])


def test_groups_hold_every_pair_once():
    columns = random_columns()
    metrics = erm.pair_metrics(columns)
    right = erm.wins(columns["chosen_reward"], columns["rejected_reward"])
    assert [each["group"] for each in metrics["by_category"]] == ["code", "maths"]
    for each in metrics["by_category"]:
        inside = columns["category"] == each["group"]
        assert (each["n"], each["accuracy"]) == (inside.sum(), pytest.approx(right[inside].mean()))
    for key in ("by_length", "by_rating_gap"):
        assert sum(each["n"] for each in metrics[key]) == 400
        assert sum(each["n"] * each["accuracy"] for each in metrics[key]) == pytest.approx(right.sum())
    longest = np.maximum(columns["chosen_length"], columns["rejected_length"])
    assert [each["n"] for each in metrics["by_length"]] == pytest.approx([100] * 4, abs=3)
    assert metrics["by_length"][-1]["group"].endswith(f" to {longest.max()}")


def test_groups_by_hand():
    group, names = erm.quantile_groups(np.array([1, 2, 3, 4, 5]), 2)
    assert (group.tolist(), names) == ([0, 0, 1, 1, 1], ["1 to 3", "3 to 5"])
    group, names = erm.quantile_groups(np.array([0.2, 0.4, 3.4 - 3.2, 1.0 - 0.6]), 2)  # equal but for rounding
    assert (group.tolist(), names) == ([0, 1, 0, 1], ["0.2 to 0.3", "0.3 to 0.4"])
    group, names = erm.quantile_groups(np.array([2.0, 2.0]), 4)
    assert (group.tolist(), names) == ([0, 0], ["2"])


def test_pairs_without_ratings_or_categories_have_no_such_groups():
    metrics = erm.pair_metrics(scored([1.0, 0.0], [0.0, 1.0], rating_gap=[math.nan, 0.5]))
    assert metrics["by_category"] == []
    assert [(each["n"], each["accuracy"]) for each in metrics["by_rating_gap"]] == [(1, 0.0)]


# --- the script ------------------------------------------------------------------------------------------------------


def evaluate(monkeypatch, output, *arguments) -> dict:
    run_main(erm, monkeypatch, "--output", output, *arguments)
    return json.loads((output / "metrics.json").read_text())


def test_files_and_total(monkeypatch, tiny_reward_model, processed, write_jsonl, tmp_path, capsys):
    rows = [{**pair, "category": "numbers", "chosen_rating": 3.0, "rejected_rating": 1.0} for pair in make_pairs(6)]
    source, output = write_jsonl([*rows, {"prompt": "broken"}]), tmp_path / "out"
    results = evaluate(monkeypatch, output, "--model", tiny_reward_model, "--pairs", source, processed)
    assert {name: each["n"] for name, each in results["files"].items()} == {source: 6, processed: 8}
    assert results["total"]["n"] == 14
    assert results["files"][source]["by_category"][0]["group"] == "numbers"
    assert results["files"][processed]["by_category"] == []
    printed = capsys.readouterr().out
    assert "1 unusable rows" in printed and "total" in printed and "numbers" in printed
    plots = {path.name for path in (output / "plots").iterdir()}
    assert plots == {
        *("rewards.png", "reliability.png", "reward_against_length.png", "accuracy_by_length.png"),
        *("accuracy_by_rating_gap.png", "accuracy_by_category.png"),
    }

    evaluator = RewardModelEvaluator(tiny_reward_model, mixed_precision=True)
    with (output / "rewards.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 14 and lines[5]["place"] == f"{source} row 6"
    for pair, line in zip(rows, lines, strict=False):
        for side in ("chosen", "rejected"):
            score = evaluator.get_reward_score(pair["prompt"], pair[side])
            assert float(line[f"{side}_reward"]) == pytest.approx(score, abs=1e-4)
    right = np.mean([float(line["chosen_reward"]) > float(line["rejected_reward"]) for line in lines])
    assert results["total"]["accuracy"] == pytest.approx(right, abs=1e-4)


def test_several_models_are_an_ensemble(monkeypatch, tiny_reward_model, other_reward_model, write_jsonl, tmp_path):
    source = write_jsonl(make_pairs(12))
    models = [tiny_reward_model, other_reward_model]
    together = evaluate(monkeypatch, tmp_path / "both", "--model", *models, "--pairs", source)
    apart = [
        evaluate(monkeypatch, tmp_path / str(number), "--model", model, "--pairs", source)
        for number, model in enumerate(models)
    ]
    for model, alone in zip(models, apart, strict=True):
        assert together["members"][model]["accuracy"] == alone["total"]["accuracy"]
    margins = [each["total"]["mean_margin"] for each in apart]
    assert together["total"]["mean_margin"] == pytest.approx(np.mean(margins), abs=1e-4)
    assert margins[0] != pytest.approx(margins[1], abs=1e-2)


def test_an_evaluation_replaces_only_an_evaluation(monkeypatch, tiny_reward_model, write_jsonl, tmp_path):
    source = write_jsonl(make_pairs(3))
    for _ in range(2):
        evaluate(monkeypatch, tmp_path / "out", "--model", tiny_reward_model, "--pairs", source)
    (tmp_path / "out" / "config.json").write_text("of a model that was trained here")
    with pytest.raises(SystemExit, match=r"holds other files \(config\.json\)"):
        evaluate(monkeypatch, tmp_path / "out", "--model", tiny_reward_model, "--pairs", source)
    assert len(list((tmp_path / "out").iterdir())) == 5


def test_categories_may_be_anything():
    assert [erm.category_of(row) for row in ({"category": 0}, {"subset": "$x_$\ud800"})] == ["0", "$x_$?"]
    assert [erm.category_of(row) for row in ({}, {"category": None}, {"category": math.nan})] == [""] * 3


def test_plots_take_any_name_and_many_categories(tmp_path):
    columns = random_columns()
    columns["category"] = np.array([f"$x_$ {number % 30}" for number in range(400)])
    (tmp_path / "plots").mkdir()
    names = erm.plot_evaluation(columns, erm.pair_metrics(columns), tmp_path / "plots")
    assert "accuracy_by_category.png" in names
    assert {path.name for path in (tmp_path / "plots").iterdir()} == set(names)


def test_repeated_prompts_show_both_intervals():
    columns = scored([1.0, 1.0, 0.0], [0.0, 0.0, 1.0], prompt_key=[1, 1, 2])
    assert "; by prompt 0.000 to 1.000" in erm.summary(erm.pair_metrics(columns))
    columns["prompt_key"] = np.arange(3)
    assert "by prompt" not in erm.summary(erm.pair_metrics(columns))


def test_nothing_to_evaluate_is_an_error(monkeypatch, tiny_reward_model, write_jsonl):
    with pytest.raises(SystemExit, match="no usable pair in 1 rows"):
        run_main(erm, monkeypatch, "--model", tiny_reward_model, "--pairs", write_jsonl([{"prompt": "a"}]))


def test_splits_and_broken_directories_are_named(monkeypatch, tiny_reward_model, processed):
    with pytest.raises(SystemExit, match="choose one of its splits by --split: train, validation"):
        run_main(erm, monkeypatch, "--model", tiny_reward_model, "--pairs", processed, "--split", "test")
    (erm.Path(processed) / "dataset_dict.json").unlink()
    with pytest.raises(SystemExit, match=r"run load_helpsteer_dataset\.py first"):
        run_main(erm, monkeypatch, "--model", tiny_reward_model, "--pairs", processed)


@pytest.mark.parametrize("flag", ["--model", "--pairs"])
def test_naming_a_place_twice_is_a_usage_error(monkeypatch, flag):
    with pytest.raises(SystemExit) as ended:
        run_main(erm, monkeypatch, flag, "a", "a")
    assert ended.value.code == 2
