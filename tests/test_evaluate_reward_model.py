import json

import numpy as np
import pytest
from conftest import make_pairs, run_main
from scipy.stats import binomtest

import evaluate_reward_model as erm
from reward_model_demo import RewardModelEvaluator


@pytest.mark.parametrize("successes, n", [(0, 5), (5, 5), (3, 10), (870, 1736), (1, 1)])
def test_wilson_interval_agrees_with_scipy(successes, n):
    interval = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert erm.wilson_interval(successes, n) == pytest.approx((interval.low, interval.high), abs=1e-6)


def test_wilson_interval_without_pairs_says_nothing():
    assert erm.wilson_interval(0, 0) == (0.0, 1.0)


def test_metrics_by_hand():
    metrics = erm.pair_metrics(
        chosen_rewards=[2.0, 1.0, 0.0, 3.0],
        rejected_rewards=[1.0, 1.0, 1.0, -1.0],
        chosen=["long one", "a", "b", "same"],
        rejected=["short", "bb", "bbb", "size "],
    )
    assert metrics["n"] == 4
    assert metrics["accuracy"] == 0.625  # two right, one tie, one wrong
    assert metrics["ties"] == 1
    assert metrics["longer_wins"] == 0.375  # right, wrong, wrong, equal once trimmed
    assert metrics["shorter_chosen"]["n"] == 2 and metrics["shorter_chosen"]["accuracy"] == 0.25
    assert metrics["mean_margin"] == 1.0
    assert metrics["reward_mean"] == 1.0
    assert metrics["reward_std"] == pytest.approx(np.sqrt((1 + 0 + 1 + 4 + 0 + 0 + 0 + 4) / 8))


def test_no_pair_with_a_shorter_chosen_answer():
    metrics = erm.pair_metrics([1.0], [0.0], ["longer"], ["x"])
    assert metrics["shorter_chosen"] == {"n": 0, "accuracy": None, "accuracy_interval": [0.0, 1.0]}


def test_script_scores_files_and_processed_directories(
    monkeypatch, tiny_reward_model, processed, write_jsonl, tmp_path, capsys
):
    source = write_jsonl([*make_pairs(6), {"prompt": "broken"}])
    for pairs, n in ((source, 6), (processed, 8)):
        run_main(erm, monkeypatch, "--model", tiny_reward_model, "--pairs", pairs, "--output", tmp_path / "m.json")
        metrics = json.loads((tmp_path / "m.json").read_text())
        assert metrics["n"] == n and metrics["pairs"] == str(pairs)
    assert "1 unusable rows" in capsys.readouterr().out
    evaluator = RewardModelEvaluator(tiny_reward_model, mixed_precision=True)
    chosen, rejected = (
        [evaluator.get_reward_score(pair["prompt"], pair[side]) for pair in make_pairs(6)]
        for side in ("chosen", "rejected")
    )
    run_main(erm, monkeypatch, "--model", tiny_reward_model, "--pairs", source, "--output", tmp_path / "m.json")
    right = np.mean(np.array(chosen) > np.array(rejected))
    assert json.loads((tmp_path / "m.json").read_text())["accuracy"] == pytest.approx(right, abs=1e-4)


def test_nothing_to_evaluate_is_an_error(monkeypatch, tiny_reward_model, write_jsonl):
    with pytest.raises(SystemExit, match="no usable pair in 1 rows"):
        run_main(erm, monkeypatch, "--model", tiny_reward_model, "--pairs", write_jsonl([{"prompt": "a"}]))


def test_splits_and_broken_directories_are_named(monkeypatch, tiny_reward_model, processed):
    with pytest.raises(SystemExit, match="choose one of its splits by --split: train, validation"):
        run_main(erm, monkeypatch, "--model", tiny_reward_model, "--pairs", processed, "--split", "test")
    (erm.Path(processed) / "dataset_dict.json").unlink()
    with pytest.raises(SystemExit, match=r"run load_helpsteer_dataset\.py first"):
        run_main(erm, monkeypatch, "--model", tiny_reward_model, "--pairs", processed)
