"""How good a reward model is on preference pairs: accuracy, calibration and length bias, with intervals and plots.

In:  one trained reward model, or several as an ensemble, and pairs: `processed_helpsteer/` (its validation split) or
     any source that `load_helpsteer_dataset.py` reads.
Out: a table on the terminal and, with `--output`, a directory with `metrics.json`, `report.txt`, `rewards.csv`,
     `mistakes.md` and `plots/`.

    python evaluate_reward_model.py
    python evaluate_reward_model.py --pairs my_pairs.jsonl other.csv --output evaluation
    python evaluate_reward_model.py --model seed_1 seed_2 seed_3 --output ensemble
    python evaluate_reward_model.py --full_precision --output published
"""

import argparse
import json
from typing import Any

from reward_pipeline.processes import run_script
from reward_pipeline.settings import Parser, boolean, column, filled_text

# ---------------------------------------------------------------------------------------------------------------------
MODEL = "./reward_model_output"  # directory or hub id of a trained reward model
PAIRS = "processed_helpsteer"  # processed directory, or any source of pairs
COLUMNS = None  # names in other layouts, such as ["prompt=question"]
SPLIT = None  # of a repository or a processed directory; None takes its usual one
OUTPUT = None  # directory for figures and plots; None prints only
FULL_PRECISION = False  # fp32 instead of bf16: slower, and the same figures on every machine
# ---------------------------------------------------------------------------------------------------------------------


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Flags over the constants above."""
    parser = Parser(__doc__)
    parser.flag(
        "model", [MODEL], filled_text, "directory or hub id; several are an ensemble", nargs="+", metavar="NAME"
    )
    parser.flag("pairs", [PAIRS], filled_text, "processed directories or sources of pairs", nargs="+", metavar="SOURCE")
    parser.flag("columns", COLUMNS, column, "names in a layout that is not known: prompt=question …", nargs="+")
    parser.flag("split", SPLIT, filled_text, "split of a dataset repository or processed directory")
    parser.flag("output", OUTPUT, filled_text, "directory for figures and plots, replaced as a whole", metavar="DIR")
    parser.flag("full_precision", FULL_PRECISION, boolean, "score in fp32, for figures that others shall repeat")
    options = parser.parse_args(arguments)
    for name in ("model", "pairs"):
        if len(set(getattr(options, name))) < len(getattr(options, name)):
            parser.error(f"--{name}: names a place twice")
    return options


def report(results: dict[str, Any]) -> str:
    """All of `metrics.json` that fits a terminal: a row for each source and the total, then the total by groups."""
    from tabulate import tabulate

    from reward_pipeline.pair_metrics import difference, gain, number, span

    def accuracy(figures: dict[str, Any]) -> str:
        return f"{number(figures['accuracy'])} ({span(figures['accuracy_interval'])})"

    def sure(figures: dict[str, Any]) -> tuple[float, float]:
        return figures["ece"], figures["brier"]

    header = ["pairs", "n", "accuracy (95 %)", "longer wins", "gain over it (95 %)", "shorter chosen", "ECE", "Brier"]
    sources = {**results["files"], "total": results["total"]} if len(results["files"]) > 1 else results["files"]
    rows = [
        [
            name,
            f"{each['n']:,}",
            accuracy(each),
            number(each["longer_wins"]),
            gain(each, "longer_wins"),
            f"{number(each['shorter_chosen_accuracy'])} (n = {each['shorter_chosen_n']:,})",
            *map(number, sure(each)),
        ]
        for name, each in sources.items()
    ]
    parts = [tabulate(rows, header, disable_numparse=True)]
    # What the model knows beyond counts of form; nobody fitted them for a model that is not this project's.
    header = ["pairs", "form model", "gain over it (95 %)", "where it is wrong", "where it can not tell"]
    rows = [
        [
            name,
            number(each["form_wins"]),
            gain(each, "form"),
            *(
                f"{number(each[f'{part}_accuracy'])} (n = {each[f'{part}_n']:,})"
                for part in ("form_wrong", "form_even")
            ),
        ]
        for name, each in sources.items()
        if each["form_wins"] is not None
    ]
    if rows:
        parts.append(tabulate(rows, header, disable_numparse=True))
    # The rewards above are the model's alone; a training with the form term has a second one.
    whole = {name: each["with_form"] for name, each in sources.items() if each["with_form"]}
    rows = [
        [name, accuracy(each), *(gain(each, other) for other in ("longer_wins", "form")), *map(number, sure(each))]
        for name, each in whole.items()
    ]
    if rows:
        gains = ("gain over longer wins (95 %)", "gain over form (95 %)")
        header = ["with the form term", "accuracy (95 %)", *gains, "ECE", "Brier"]
        parts.append(tabulate(rows, header, disable_numparse=True))
    # Whether it needs the prompt for what it does.
    header = ["pairs", "prompts shuffled among the pairs", "lost by it (95 %)", "own answer against another prompt's"]
    rows = [
        [
            name,
            f"{number(each['shuffled_prompt_accuracy'])} (n = {each['shuffled_prompt_n']:,})",
            difference(each["shuffled_prompt_loss"], each["shuffled_prompt_loss_interval"]),
            f"{number(each['own_prompt_accuracy'])} (n = {each['own_prompt_n']:,})",
        ]
        for name, each in sources.items()
        if each["shuffled_prompt_n"]
    ]
    if rows:
        parts.append(tabulate(rows, header, disable_numparse=True))
    if len(results["members"]) > 1:
        rows = [[name, accuracy(each)] for name, each in results["members"].items()]
        parts.append(tabulate(rows, ["member", "accuracy (95 %)"], disable_numparse=True))
    total = results["total"]
    for title, key in [("rating gap", "by_rating_gap"), ("characters", "by_length"), ("category", "by_category")]:
        rows = [[each["group"], f"{each['n']:,}", accuracy(each), number(each["longer_wins"])] for each in total[key]]
        if rows:
            parts.append(tabulate(rows, [title, "n", "accuracy (95 %)", "longer wins"], disable_numparse=True))
    cut = total["cut_share"]
    parts.append(
        f"reward {total['reward_mean']:+.3f} ± {total['reward_std']:.3f}, mean margin {total['mean_margin']:+.3f}; "
        f"rank correlation with length {number(total['spearman_reward_length'])}, within pairs "
        f"{number(total['spearman_margin_length'])}; cut: {cut['prompt']:.0%} of the prompts, an answer in "
        f"{cut['response']:.0%} of the pairs; {total['prompts']:,} prompts, over which the intervals are; "
        f"scored in {results['precision']}"
    )
    return "\n\n".join(parts)


def main() -> None:
    options = parse_options()

    # Only now what takes seconds to load: a wrong flag is answered at once.
    import numpy as np

    from reward_pipeline.cards import write_evaluation
    from reward_pipeline.evaluator import RewardModelEvaluator, check_templates
    from reward_pipeline.files import rounded, write_text
    from reward_pipeline.pair_metrics import accuracy_with_interval, join_columns, pair_metrics, score_pairs
    from reward_pipeline.processed import read_pairs
    from reward_pipeline.runs import evaluation_directory
    from reward_pipeline.sources import check_split
    from reward_pipeline.statistics import wins

    check_split(options.pairs, options.split)
    sources = {name: read_pairs(name, options.split, options.columns or ()) for name in options.pairs}
    # Scores in bf16 differ in the third decimal with the batch that a pair is in, so the figures do on other machines.
    evaluator = RewardModelEvaluator(options.model, mixed_precision=not options.full_precision)
    for pairs in sources.values():
        check_templates(evaluator, pairs["prompt"], pairs["place"])

    # Opened before the scoring: a directory that can not be written is found before the work is done.
    with evaluation_directory(options.output) as directory:
        scored = {name: score_pairs(evaluator, pairs, name) for name, pairs in sources.items()}
        columns = join_columns([each for each, _ in scored.values()])
        margins = np.concatenate([each for _, each in scored.values()], axis=1)  # (members, pairs)

        files = {name: pair_metrics(each) for name, (each, _) in scored.items()}
        results = {
            "models": options.model,
            "precision": evaluator.precision,
            "members": {
                model: accuracy_with_interval(wins(each), columns["prompt_key"])
                for model, each in zip(options.model, margins, strict=True)
            },
            "files": files,
            "total": pair_metrics(columns) if len(files) > 1 else next(iter(files.values())),
        }

        text = report(results)
        print(text)
        if directory:
            write_evaluation(columns, results["total"], directory)
            write_text(directory / "metrics.json", json.dumps(rounded(results), indent=2, ensure_ascii=False) + "\n")
            write_text(directory / "report.txt", text + "\n")
    if options.output:
        print(f"\nwritten to {options.output}/")


if __name__ == "__main__":
    run_script(main)
