"""Runs of `train_reinforce.py` and `rloo_trainer.py` side by side: one table.

In:  their output directories.
Out: a table on the terminal.

    python benchmarks/compare_policies.py reinforce_output rloo

Give all of them the same judges, prompts, completions an update and seed; the table says where they were not alike.
"""

import json
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reward_pipeline.files import InputError
from reward_pipeline.pair_metrics import difference
from reward_pipeline.processes import run_script
from reward_pipeline.settings import Parser

# What has to be the same for a comparison of algorithms.
ALIKE = ("steps", "completions_per_step", "max_new_tokens", "max_prompt_length", "evaluation_prompts", "seed")


def read(directory: Path, name: str) -> Any:
    """A JSON file of a run.

    Raises:
        InputError: it is not there, or damaged.
    """
    try:
        return json.loads((directory / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{directory}/{name}: no finished run of train_reinforce.py or rloo_trainer.py") from error


def update_seconds(directory: Path, settings: dict[str, Any]) -> float:
    """Seconds that all updates of a run took."""
    if "seconds" in settings:
        return settings["seconds"]
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return sum(json.loads(line)["seconds"] for line in lines)


def row(directory: Path) -> list[str]:
    """A run in the table: gains by both judges, at equal form too, constraints kept, KL and seconds."""
    results, settings = read(directory, "evaluation.json"), read(directory, "settings.json")
    gains = [
        difference(results[name], results[f"{name}_interval"])
        for prefix in ("", "second_judge_")
        for name in (f"{prefix}reward_gain", f"{prefix}reward_gain_at_equal_form")
    ]
    kept = difference(results["constraint_pass_gain"], results["constraint_pass_gain_interval"])
    return [directory.name, *gains, kept, f"{results['kl']:.2f}", f"{update_seconds(directory, settings):.0f}"]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="output directories")
    options = parser.parse_args()
    header = ["run", "reward gain", "at equal form", "second judge", "at equal form", "constraints", "KL", "seconds"]
    print(tabulate([row(each) for each in options.runs], header, tablefmt="github", disable_numparse=True))
    settings = [read(each, "settings.json") for each in options.runs]
    for name in ALIKE:
        values = {str(each.get(name)) for each in settings}
        if len(values) > 1:
            print(f"not alike: {name} is {', '.join(sorted(values))}")


if __name__ == "__main__":
    run_script(main)
