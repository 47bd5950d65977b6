import numpy as np
import pandas
import pytest
from conftest import run_main
from test_evaluate_reward_model import random_columns

from benchmarks import compare_runs
from evaluate_reward_model import pair_metrics, write_evaluation
from load_smollm_model import InputError


@pytest.fixture
def runs(tmp_path):
    columns = {"first": random_columns(), "second": random_columns()}
    columns["second"]["chosen_reward"] = columns["second"]["chosen_reward"] + 1
    for name, each in columns.items():
        (tmp_path / name).mkdir()
        write_evaluation(each, pair_metrics(each), tmp_path / name)
    return columns, tmp_path


def test_rewards_are_read_as_they_were_written(runs):
    columns, directory = runs
    again = compare_runs.read_columns(str(directory / "first"))
    assert again.keys() == columns["first"].keys()
    for name, values in columns["first"].items():
        np.testing.assert_array_equal(again[name], values)


def test_runs_are_compared_pair_by_pair(runs):
    columns, _ = runs
    accuracy = [pair_metrics(each)["accuracy"] for each in columns.values()]
    first, second = compare_runs.compare(columns)
    assert first[0] == "first" and first[3] == ""
    assert second[3].startswith(f"{accuracy[1] - accuracy[0]:+.3f} (")
    low, high = second[3].split("(")[1].rstrip(")").split(" to ")
    assert 0 < float(low) < accuracy[1] - accuracy[0] < float(high)


def test_runs_on_other_pairs_are_refused(runs):
    columns, _ = runs
    columns["second"] = random_columns(seed=1)
    with pytest.raises(InputError, match="other pairs than first"):
        compare_runs.compare(columns)


def test_a_run_without_rewards_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no readable rewards\.csv"):
        compare_runs.read_columns(str(tmp_path))
    (tmp_path / "rewards.csv").write_text("prompt_key,chosen_reward\n1,0.5\n")
    with pytest.raises(InputError, match="no column category"):
        compare_runs.read_columns(str(tmp_path))


@pytest.mark.parametrize(
    "column, value",
    [
        ("chosen_reward", ""), ("rejected_reward", "high"), ("chosen_reward", "True"), ("rejected_reward", "inf"),
        ("chosen_length", "nan"), ("rejected_length", ""),
    ],
)  # fmt: skip
def test_what_is_no_number_is_named_with_its_line(runs, column, value, monkeypatch):
    _, directory = runs
    path = directory / "second" / "rewards.csv"
    table = pandas.read_csv(path, dtype=str, keep_default_na=False)
    table.loc[4, "category"] = "two\nlines"
    table.loc[7:9, column] = value
    table.to_csv(path, index=False)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], "", *lines[3:]]) + "\n")
    with pytest.raises(SystemExit) as ended:
        run_main(compare_runs, monkeypatch, directory / "first", directory / "second")
    # Line 1 is the header, so row 7 would be line 9, but for the empty line and the category in two lines.
    assert f"{path}, line 11: {column} is {value!r}, not a number; evaluate" in ended.value.code


def test_rewards_that_are_all_text_are_named(runs):
    _, directory = runs
    path = directory / "first" / "rewards.csv"
    pandas.read_csv(path).assign(rejected_reward="x").to_csv(path, index=False)
    with pytest.raises(InputError, match="line 2: rejected_reward is 'x'"):
        compare_runs.read_columns(str(directory / "first"))
