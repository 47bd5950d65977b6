"""A table of evaluated runs on the same pairs: each with its figures, and its paired difference to the first one.

In:  directories with a `rewards.csv`, written by `evaluate_reward_model.py --output`, `train_reward_model.py` or
     `naive_recipe.py`, all for the same pairs.
Out: a Markdown table on the terminal. All intervals are 95 % bootstrap intervals over prompts.

    python benchmarks/compare_runs.py naive reward_model_output other_output
    python benchmarks/compare_runs.py --form true reward_model_output seed_43

With `--form true` the rewards are those with the form term, of the runs that were trained with it.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import pandas
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reward_pipeline.files import InputError, first_line
from reward_pipeline.pair_metrics import Columns, gain, number, pair_metrics, span, with_form
from reward_pipeline.processes import run_script
from reward_pipeline.settings import Parser, boolean
from reward_pipeline.statistics import bootstrap_interval, wins

NUMBERS = ("chosen_reward", "rejected_reward", "chosen_length", "rejected_length")
MAY_BE_MISSING = ("author_margin", "chosen_form", "rejected_form")  # empty, or of an earlier version
MAY_BE_EMPTY = ("rating_gap", "form_margin", *MAY_BE_MISSING)
NEEDED = {*NUMBERS, "prompt_key", "category", "rating_gap", "form_margin"}
LONGEST_CELL = 2**31 - 1  # characters; the csv module refuses answers of more than 131,072 otherwise
HEADER = [
    *("run", "n", "accuracy (95 %)", "difference (95 %)", "gain over longer wins (95 %)", "gain over form (95 %)"),
    *("shorter chosen", "ECE"),
]


def read_columns(directory: str) -> Columns:
    """What a comparison needs of the scored pairs of a run; the texts stay in the file.

    Raises:
        InputError: no such file, or it can not be read, or a reward or length in it is not a number.
    """
    path = Path(directory) / "rewards.csv"
    try:
        table = pandas.read_csv(
            path,
            usecols=lambda name: name in {*NEEDED, *MAY_BE_MISSING},
            dtype={"category": str, **dict.fromkeys(MAY_BE_EMPTY, float)},
            keep_default_na=False,
            na_values={name: [""] for name in MAY_BE_EMPTY},
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{directory}: no readable rewards.csv ({first_line(error)}); evaluate the run first"
        ) from error
    missing = NEEDED - set(table.columns)
    if missing or not len(table):
        what = f"no column {sorted(missing)[0]}" if missing else "no rows"
        raise InputError(f"{directory}: its rewards.csv has {what}; evaluate the run again")
    for name in NUMBERS:
        values = pandas.to_numeric(table[name].astype(str), errors="coerce")
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            value = str(table[name].iloc[wrong[0]])
            raise InputError(
                f"{path}, line {line_of(path, wrong[0])}: {name} is {value!r}, not a number; evaluate the run again"
            )
    unknown = {name: np.full(len(table), np.nan) for name in MAY_BE_MISSING}
    return unknown | {name: table[name].to_numpy() for name in table.columns}


def line_of(path: Path, row: int) -> int:
    """Where a row of the table ends in its file; empty lines are no rows, and a quoted cell may have several."""
    csv.field_size_limit(LONGEST_CELL)
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        ends = [reader.line_num for cells in reader if cells]
    return ends[row + 1]  # the first one is the header's


def compare(runs: dict[str, Columns]) -> list[list[str]]:
    """A row of text for each run.

    Raises:
        InputError: the runs were not evaluated on the same pairs.
    """
    baseline = next(iter(runs.values()))
    right = wins(baseline["chosen_reward"], baseline["rejected_reward"])
    rows = []
    for name, columns in runs.items():
        same = ("prompt_key", "chosen_length", "rejected_length")
        if any(not np.array_equal(columns[each], baseline[each]) for each in same):
            raise InputError(f"{name}: was evaluated on other pairs than {next(iter(runs))}")
        metrics = pair_metrics(columns)
        difference = wins(columns["chosen_reward"], columns["rejected_reward"]) - right
        against = f"{difference.mean():+.3f} ({span(bootstrap_interval(difference, columns['prompt_key']))})"
        rows.append(
            [
                name,
                f"{metrics['n']:,}",
                f"{metrics['accuracy']:.3f} ({span(metrics['accuracy_interval'])})",
                against if columns is not baseline else "",
                gain(metrics, "longer_wins"),
                gain(metrics, "form"),
                number(metrics["shorter_chosen_accuracy"]),
                number(metrics["ece"]),
            ]
        )
    return rows


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="DIR", help="evaluated runs, the one to compare with first")
    parser.flag("form", False, boolean, "compare the rewards with the form term, where the training had it")
    options = parser.parse_args()
    if len(set(options.runs)) < len(options.runs):
        parser.error("a run is named twice")
    runs = {directory: read_columns(directory) for directory in options.runs}
    if options.form:
        runs = {directory: with_form(columns) or columns for directory, columns in runs.items()}
    rows = compare(runs)
    print(tabulate(rows, HEADER, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    run_script(main)
