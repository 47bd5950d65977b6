import numpy as np
import pandas
import pytest
from conftest import run_main
from test_evaluate_reward_model import random_columns

from benchmarks import remove_length
from benchmarks.compare_runs import read_columns
from evaluate_reward_model import pair_metrics, write_evaluation


def with_length_term(slope: float):
    """Columns whose rewards are noise plus `slope` times log(characters), and the noise."""
    columns = random_columns()
    noise = {side: columns[f"{side}_reward"] for side in remove_length.SIDES}
    for side in remove_length.SIDES:
        columns[f"{side}_reward"] = noise[side] + slope * np.log(columns[f"{side}_length"])
    return columns, noise


def test_the_term_is_taken_out_again():
    columns, noise = with_length_term(50.0)
    margins = noise["chosen"] - noise["rejected"]
    corrected = remove_length.without_length(columns)
    found = corrected["chosen_reward"] - corrected["rejected_reward"]
    # What is left of the slope is what noise and length have in common by chance.
    assert np.corrcoef(found, margins)[0, 1] > 0.95
    assert np.corrcoef(columns["chosen_reward"] - columns["rejected_reward"], margins)[0, 1] < 0.7


def test_no_pair_is_judged_by_a_term_fitted_to_it():
    columns, _ = with_length_term(2.0)
    first = remove_length.halves(columns["prompt_key"])
    assert 0.2 < first.mean() < 0.8
    changed = {**columns, "chosen_reward": np.where(first, columns["chosen_reward"] * 3, columns["chosen_reward"])}
    before, after = remove_length.without_length(columns), remove_length.without_length(changed)
    difference = after["rejected_reward"] - before["rejected_reward"]
    assert not difference[first].any() and difference[~first].all()


def test_the_halves_share_no_prompt():
    keys = np.repeat(np.arange(50), 3)
    first = remove_length.halves(keys)
    assert not set(keys[first]) & set(keys[~first]) and first.sum() == 75


def test_the_result_is_a_run_to_compare(tmp_path, monkeypatch):
    columns, _ = with_length_term(2.0)
    (tmp_path / "run").mkdir()
    write_evaluation(columns, pair_metrics(columns), tmp_path / "run")
    run_main(remove_length, monkeypatch, tmp_path / "run", tmp_path / "corrected")
    corrected = read_columns(str(tmp_path / "corrected"))
    expected = remove_length.without_length(columns)
    assert corrected["chosen_reward"] == pytest.approx(expected["chosen_reward"], abs=1e-9)
    assert (corrected["prompt_key"] == columns["prompt_key"]).all()


def test_a_reward_that_is_no_number_is_named(tmp_path, monkeypatch):
    columns = random_columns()
    columns["rejected_reward"][3] = np.nan  # an empty cell of the file
    (tmp_path / "run").mkdir()
    pandas.DataFrame(columns).to_csv(tmp_path / "run" / "rewards.csv", index=False)
    with pytest.raises(SystemExit) as ended:
        run_main(remove_length, monkeypatch, tmp_path / "run", tmp_path / "corrected")
    assert "rewards.csv, line 5: rejected_reward is ''" in ended.value.code and "\n" not in ended.value.code
    assert not (tmp_path / "corrected").exists()


def test_one_prompt_can_not_be_halved(tmp_path, monkeypatch):
    columns = {**random_columns(), "prompt_key": np.zeros(len(random_columns()["prompt_key"]), dtype=int)}
    (tmp_path / "run").mkdir()
    write_evaluation(columns, pair_metrics(columns), tmp_path / "run")
    with pytest.raises(SystemExit) as ended:
        run_main(remove_length, monkeypatch, tmp_path / "run", tmp_path / "corrected")
    assert "one prompt" in str(ended.value.code) and not (tmp_path / "corrected").exists()
