"""Rewards without what the length of the answer explains of them: a length term removed at scoring.

In:  a directory with a `rewards.csv`; see `compare_runs.py`.
Out: a new directory with a `rewards.csv`, for `compare_runs.py`.

    python benchmarks/remove_length.py reward_model_output without_length

The term is the regression of the reward on log(characters). The prompts are halved, and each half is corrected by the
regression over the other half, so that no pair is judged by a term that was fitted to it.
"""

import sys
from pathlib import Path

import numpy as np
import pandas

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.compare_runs import read_columns
from reward_pipeline.files import InputError, replace_file
from reward_pipeline.pair_metrics import Columns
from reward_pipeline.processes import run_script
from reward_pipeline.runs import evaluation_directory
from reward_pipeline.settings import Parser

SIDES = ("chosen", "rejected")


def halves(prompt_key: np.ndarray, seed: int = 0) -> np.ndarray:
    """(N,) bool: a random half of the prompts."""
    _, prompt = np.unique(prompt_key, return_inverse=True)
    return np.random.default_rng(seed).permutation(prompt.max() + 1)[prompt] % 2 == 0


def log_lengths(columns: Columns) -> list[np.ndarray]:
    return [np.log(np.maximum(columns[f"{side}_length"], 1)) for side in SIDES]


def length_slope(columns: Columns, rows: np.ndarray) -> float:
    """Slope of the regression of the reward on log(characters), over both answers of the rows."""
    lengths = np.concatenate([each[rows] for each in log_lengths(columns)])
    rewards = np.concatenate([columns[f"{side}_reward"][rows] for side in SIDES])
    return float(np.polyfit(lengths, rewards, 1)[0])


def without_length(columns: Columns) -> Columns:
    """The columns with corrected rewards."""
    first = halves(columns["prompt_key"])
    slopes = np.where(first, length_slope(columns, ~first), length_slope(columns, first))
    corrected = {
        f"{side}_reward": columns[f"{side}_reward"] - slopes * lengths
        for side, lengths in zip(SIDES, log_lengths(columns), strict=True)
    }
    return {**columns, **corrected}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", help="directory with a rewards.csv")
    parser.add_argument("output", help="directory to write")
    options = parser.parse_args()
    columns = read_columns(options.run)
    if len(np.unique(columns["prompt_key"])) < 2:
        raise InputError(f"{options.run}: has one prompt only; two halves of the prompts are needed")
    with evaluation_directory(options.output) as directory, replace_file(directory / "rewards.csv") as file:
        pandas.DataFrame(without_length(columns)).to_csv(file, index=False)


if __name__ == "__main__":
    run_script(main)
