"""How good a reward model is on preference pairs: accuracy, calibration and length bias, with intervals and plots.

In:  one trained reward model, or several as an ensemble, and pairs: `processed_helpsteer/` (its validation split) or
     any source that `load_helpsteer_dataset.py` reads.
Out: a table on the terminal and, with `--output`, a directory with `metrics.json`,
     `report.txt`, `rewards.csv` and `plots/`.

    python evaluate_reward_model.py
    python evaluate_reward_model.py --pairs my_pairs.jsonl other.csv --output evaluation
    python evaluate_reward_model.py --model seed_1 seed_2 seed_3 --output ensemble

`train_reward_model.py` calls the same functions at its end, and `model_card` for the README.md of its model.
"""

import argparse
import contextlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import scipy.special
import scipy.stats
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from matplotlib.figure import Figure
from tabulate import tabulate

from conversations import encode_stream, response_length
from load_helpsteer_dataset import (
    OUTPUT_DIR,
    check_split,
    checked_pairs,
    load_processed,
    open_source,
    pair_keys,
    pick_split,
)
from load_smollm_model import InputError, is_first_process, replace_directory, replace_file, run_script, write_text
from reward_model_demo import (
    MODEL_PATH,
    RewardModelEvaluator,
    bootstrap_interval,
    check_templates,
    rate_interval,
    wilson_interval,
    wins,
)

# ---------------------------------------------------------------------------------------------------------------------
PAIRS = OUTPUT_DIR  # processed directory, or any source of pairs
BATCH_SIZE = 16  # conversations scored at once
GROUPS = 4  # groups of equal size for accuracy by length and by rating gap
CONFIDENCE_BINS = 10  # of equal width between 0.5 and 1, for the calibration error
# ---------------------------------------------------------------------------------------------------------------------

OUTPUT_FILES = {"metrics.json", "rewards.csv", "report.txt", "plots"}  # of an evaluation
PLOTTED_CATEGORIES = 20  # at most, the largest ones
CATEGORY_COLUMNS = ("category", "subset")  # names under which sources tell what kind of prompt a pair has

# Arrays of equal length, one entry a pair: "pairs" (name of the source), "place" (its row there), "prompt_key" (hash of
# the prompt), "chosen_reward", "rejected_reward", "chosen_length", "rejected_length" (characters), "rating_gap" (NaN
# where unknown), "category" ("" where unknown), "prompt_cut", "response_cut" (either answer).
Columns = dict[str, np.ndarray]


# --- pairs become columns --------------------------------------------------------------------------------------------


def read_pairs(name: str, split: str | None = None) -> Dataset:
    """Pairs of a processed directory (its validation split) or of any source, without the unusable rows.

    Returns:
        The columns of `load_helpsteer_dataset.check_pair`, with `place` (where the pair stands) and `category`.
    """
    if (Path(name) / "metadata.json").is_file():
        splits, _ = load_processed(name)
        return processed_pairs(splits, name, pick_split(name, list(splits), split or "validation"))
    pairs, dropped = [], 0
    for row, pair, _ in checked_pairs(open_source(name, split).rows):
        if pair:
            pairs.append({**pair, "place": row.location, "category": category_of(row.values)})
        else:
            dropped += 1
    if not pairs:
        raise InputError(f"{name}: no usable pair in {dropped} rows; load_helpsteer_dataset.py names the reasons")
    if dropped:
        print(f"{name}: {dropped:,} unusable rows left out (load_helpsteer_dataset.py names the reasons)")
    return Dataset.from_list(pairs)


def category_of(row: dict[str, Any]) -> str:
    """What the row's category column says; empty without one."""
    values = [row[column] for column in CATEGORY_COLUMNS if row.get(column) not in (None, "")]
    if not values or isinstance(values[0], list | dict) or values[0] != values[0]:  # NaN: an empty cell
        return ""
    return str(values[0]).encode("utf-8", "replace").decode("utf-8")


def processed_pairs(splits: dict[str, Dataset], name: str, split: str) -> Dataset:
    """A processed split in the form of `read_pairs`."""
    pairs = splits[split].select_columns(["prompt", "chosen", "rejected", "chosen_rating", "rejected_rating"])
    places = [f"{name}, {split} row {number}" for number in range(1, len(pairs) + 1)]
    return pairs.add_column("place", places).add_column("category", [""] * len(pairs))


def text_columns(pairs: Dataset, name: str) -> Columns:
    """What is known of N pairs before they are scored."""
    chosen, rejected = (pairs[column] for column in ("chosen", "rejected"))
    ratings = [np.array(pairs[f"{side}_rating"], dtype=float) for side in ("chosen", "rejected")]
    return {
        "pairs": np.array([name] * len(pairs)),
        "place": np.array(pairs["place"]),
        "prompt_key": np.array([pair_keys(pair)["prompt_key"] for pair in pairs]),
        "chosen_length": np.array([response_length(text) for text in chosen]),
        "rejected_length": np.array([response_length(text) for text in rejected]),
        "rating_gap": ratings[0] - ratings[1],
        "category": np.array(pairs["category"]),
    }


def score_pairs(evaluator: RewardModelEvaluator, pairs: Dataset, name: str) -> tuple[Columns, np.ndarray]:
    """Score both answers of N pairs.

    Returns:
        The columns (what is cut is told by the first member's tokenizer and length), and the (M, N) margins of the
        evaluator's M members.
    """
    prompts, chosen, rejected = (list(pairs[column]) for column in ("prompt", "chosen", "rejected"))
    scores = evaluator.get_member_scores(
        [*prompts, *prompts], [*chosen, *rejected], BATCH_SIZE, progress=is_first_process()
    )
    rewards = evaluator.combine(scores)
    cuts = [
        [
            (one.prompt_cut, one.response_cut)
            for one in encode_stream(evaluator.tokenizer, prompts, side, evaluator.max_length)
        ]
        for side in (chosen, rejected)
    ]
    columns = {
        **text_columns(pairs, name),
        "chosen_reward": rewards[: len(pairs)],
        "rejected_reward": rewards[len(pairs) :],
        "prompt_cut": np.array([prompt_cut for prompt_cut, _ in cuts[0]]),
        "response_cut": np.array([one or other for (_, one), (_, other) in zip(*cuts, strict=True)]),
    }
    return columns, scores[:, : len(pairs)] - scores[:, len(pairs) :]


def score_together(evaluator: RewardModelEvaluator, pairs: Dataset, name: str) -> Columns:
    """The columns of `score_pairs` with the pairs divided among the processes: each is scored once, by one of them.

    All processes have to call it; all get the columns of all pairs, in their order.
    """
    state = PartialState()
    mine = pairs.shard(state.num_processes, state.process_index, contiguous=True)
    return join_columns(gather_object([score_pairs(evaluator, mine, name)[0]] if len(mine) else []))


def join_columns(tables: Sequence[Columns]) -> Columns:
    """The pairs of several sources as one."""
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


# --- columns become figures ------------------------------------------------------------------------------------------


def accuracy_with_interval(pair_wins: np.ndarray) -> dict[str, Any]:
    """n, mean of the wins (None without pairs) and its Wilson 95 % interval."""
    n = len(pair_wins)
    interval = list(wilson_interval(float(pair_wins.sum()), n))
    return {"n": n, "accuracy": float(pair_wins.mean()) if n else None, "accuracy_interval": interval}


def reliability(margins: np.ndarray, bins: int = CONFIDENCE_BINS) -> list[dict[str, float]]:
    """How often the preferred answer is the chosen one, by the confidence sigmoid(|margin|) of the preference.

    Returns:
        For each non-empty of `bins` equal parts of [0.5, 1]: n, mean confidence and accuracy (ties half).
    """
    confidence, pair_wins = scipy.special.expit(np.abs(margins)), wins(margins, np.zeros_like(margins))
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    return [
        {
            "n": int((place == number).sum()),
            "confidence": float(confidence[place == number].mean()),
            "accuracy": float(pair_wins[place == number].mean()),
        }
        for number in np.unique(place)
    ]


def calibration_error(bins: Sequence[dict[str, float]]) -> float:
    """Expected calibration error (arXiv 1706.04599): mean gap of confidence and accuracy, weighted by n."""
    total = sum(each["n"] for each in bins)
    return sum(each["n"] / total * abs(each["confidence"] - each["accuracy"]) for each in bins)


def spearman(values: np.ndarray, others: np.ndarray) -> float | None:
    """Rank correlation; None where one side is constant."""
    if np.ptp(values) == 0 or np.ptp(others) == 0:
        return None
    return float(scipy.stats.spearmanr(values, others).statistic)


def quantile_groups(values: np.ndarray, count: int = GROUPS) -> tuple[np.ndarray, list[str]]:
    """Split values into at most `count` groups of about equal size.

    Returns:
        (N,) number of each value's group, and the groups' bounds in words, in ascending order.
    """
    values = values.round(6)  # differences of ratings that are equal on paper may not be equal in binary
    edges = np.unique(np.quantile(values, np.linspace(0, 1, count + 1)))
    labels = [f"{edge:.0f}" if edges[-1] >= 100 else f"{round(edge, 2):g}" for edge in edges]
    if len(edges) == 1:
        return np.zeros(len(values), dtype=int), labels
    group = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    return group, [f"{low} to {high}" for low, high in itertools.pairwise(labels)]


def accuracy_by(group: np.ndarray, names: Sequence[str], pair_wins: np.ndarray, longer: np.ndarray) -> list[dict]:
    """Accuracy, its interval and the longer-wins baseline of every non-empty group."""
    return [
        {
            "group": name,
            **accuracy_with_interval(pair_wins[group == number]),
            "longer_wins": float(longer[group == number].mean()),
        }
        for number, name in enumerate(names)
        if (group == number).any()
    ]


def pair_metrics(columns: Columns) -> dict[str, Any]:
    """Figures for N scored pairs.

    Returns:
        - `n`, `prompts` (different ones), `accuracy` (ties half), `accuracy_interval` (Wilson; it takes pairs as
          independent), `accuracy_interval_by_prompt` (bootstrap over prompts, wider where they have several pairs),
          `ties`
        - `longer_wins`, accuracy of preferring the answer with more characters; `gain_over_longer_wins` and its paired
          bootstrap interval over prompts
        - `shorter_chosen_n`, `shorter_chosen_accuracy`, `shorter_chosen_interval`: pairs whose chosen answer is the
          shorter one
        - `mean_margin`; `brier`, mean of (1 - sigmoid(margin))^2; `ece` (`calibration_error`), `reliability` (its bins)
        - `reward_mean`, `reward_std` of all 2 N answers; `spearman_reward_length` over these, and
          `spearman_margin_length` of the differences within a pair
        - `by_rating_gap`, `by_length` (characters of the longer answer), `by_category`: see `accuracy_by`; empty where
          the pairs do not say
        - `cut_share` of pairs with a cut prompt, or with a cut answer
    """
    chosen, rejected = columns["chosen_reward"], columns["rejected_reward"]
    margins, pair_wins = chosen - rejected, wins(chosen, rejected)
    extra = columns["chosen_length"] - columns["rejected_length"]
    longer = wins(extra, np.zeros_like(extra))
    shorter = accuracy_with_interval(pair_wins[extra < 0])
    rewards = np.concatenate([chosen, rejected])
    lengths = np.concatenate([columns["chosen_length"], columns["rejected_length"]])
    bins = reliability(margins)
    return {
        **accuracy_with_interval(pair_wins),
        "accuracy_interval_by_prompt": rate_interval(pair_wins, columns["prompt_key"]),
        "prompts": len(np.unique(columns["prompt_key"])),
        "ties": int((pair_wins == 0.5).sum()),
        "longer_wins": float(longer.mean()),
        "gain_over_longer_wins": float((pair_wins - longer).mean()),
        "gain_over_longer_wins_interval": bootstrap_interval(pair_wins - longer, columns["prompt_key"]),
        "shorter_chosen_n": shorter["n"],
        "shorter_chosen_accuracy": shorter["accuracy"],
        "shorter_chosen_interval": shorter["accuracy_interval"],
        "mean_margin": float(margins.mean()),
        "brier": float(np.mean(scipy.special.expit(-margins) ** 2)),
        "ece": calibration_error(bins),
        "reliability": bins,
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "spearman_reward_length": spearman(rewards, lengths),
        "spearman_margin_length": spearman(margins, extra),
        **breakdowns(columns, pair_wins, longer),
        "cut_share": {
            side: float(columns[f"{side}_cut"].mean()) for side in ("prompt", "response") if f"{side}_cut" in columns
        },
    }


def breakdowns(columns: Columns, pair_wins: np.ndarray, longer: np.ndarray) -> dict[str, list[dict]]:
    """Accuracy by rating gap, by length and by category."""
    rated = ~np.isnan(columns["rating_gap"])
    by_gap = quantile_groups(columns["rating_gap"][rated]) if rated.any() else (np.zeros(0), [])
    by_length = quantile_groups(np.maximum(columns["chosen_length"], columns["rejected_length"]))
    named = columns["category"] != ""
    names, category = np.unique(columns["category"][named], return_inverse=True)
    return {
        "by_rating_gap": accuracy_by(*by_gap, pair_wins[rated], longer[rated]),
        "by_length": accuracy_by(*by_length, pair_wins, longer),
        "by_category": accuracy_by(category, names.tolist(), pair_wins[named], longer[named]),
    }


def rounded(value: Any) -> Any:
    """The same figures with four decimals, for files that people read."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


# --- figures become text and pictures --------------------------------------------------------------------------------


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def span(bounds: Sequence[float] | None) -> str:
    return "–" if bounds is None else f"{bounds[0]:.3f} to {bounds[1]:.3f}"


def intervals(metrics: dict[str, Any]) -> str:
    """95 % interval of the accuracy; where prompts have several pairs also the wider one that heeds it."""
    by_prompt = (
        f"; by prompt {span(metrics['accuracy_interval_by_prompt'])}" if metrics["prompts"] < metrics["n"] else ""
    )
    return span(metrics["accuracy_interval"]) + by_prompt


def summary(metrics: dict[str, Any]) -> str:
    """The figures in one line."""
    return (
        f"accuracy {metrics['accuracy']:.3f} (95 % interval {intervals(metrics)}, "
        f"n = {metrics['n']:,}; longer wins: {metrics['longer_wins']:.3f})"
    )


def report(results: dict[str, Any]) -> str:
    """All of `metrics.json` that fits a terminal: a row for each source and the total, then the total by groups."""
    header = ["pairs", "n", "accuracy (95 %)", "longer wins", "gain over it (95 %)", "shorter chosen", "ECE", "Brier"]
    sources = {**results["files"], "total": results["total"]} if len(results["files"]) > 1 else results["files"]
    rows = [
        [
            name,
            f"{each['n']:,}",
            f"{each['accuracy']:.3f} ({intervals(each)})",
            number(each["longer_wins"]),
            f"{each['gain_over_longer_wins']:+.3f} ({span(each['gain_over_longer_wins_interval'])})",
            f"{number(each['shorter_chosen_accuracy'])} (n = {each['shorter_chosen_n']:,})",
            number(each["ece"]),
            number(each["brier"]),
        ]
        for name, each in sources.items()
    ]
    parts = [tabulate(rows, header, disable_numparse=True)]
    if len(results["members"]) > 1:
        rows = [
            [name, f"{each['accuracy']:.3f} ({span(each['accuracy_interval'])})"]
            for name, each in results["members"].items()
        ]
        parts.append(tabulate(rows, ["member", "accuracy (95 %)"], disable_numparse=True))
    total = results["total"]
    for title, key in [("rating gap", "by_rating_gap"), ("characters", "by_length"), ("category", "by_category")]:
        rows = [
            [
                each["group"],
                f"{each['n']:,}",
                f"{each['accuracy']:.3f} ({span(each['accuracy_interval'])})",
                number(each["longer_wins"]),
            ]
            for each in total[key]
        ]
        if rows:
            parts.append(tabulate(rows, [title, "n", "accuracy (95 %)", "longer wins"], disable_numparse=True))
    cut = total["cut_share"]
    parts.append(
        f"reward {total['reward_mean']:+.3f} ± {total['reward_std']:.3f}, mean margin {total['mean_margin']:+.3f}; "
        f"rank correlation with length {number(total['spearman_reward_length'])}, within pairs "
        f"{number(total['spearman_margin_length'])}; cut: {cut['prompt']:.0%} of the prompts, an answer in "
        f"{cut['response']:.0%} of the pairs"
    )
    return "\n\n".join(parts)


def plot_evaluation(columns: Columns, metrics: dict[str, Any], directory: Path) -> list[str]:
    """Draw the figures of `pair_metrics`; returns the names of the files written."""
    figures = {
        "rewards.png": plot_rewards(columns),
        "reliability.png": plot_reliability(metrics["reliability"], metrics["ece"]),
        "reward_against_length.png": plot_against_length(columns),
        "accuracy_by_length.png": plot_groups(metrics["by_length"], "characters of the longer answer"),
    }
    if metrics["by_rating_gap"]:
        figures["accuracy_by_rating_gap.png"] = plot_groups(metrics["by_rating_gap"], "rating gap")
    if metrics["by_category"]:
        largest = sorted(metrics["by_category"], key=lambda each: each["n"], reverse=True)[:PLOTTED_CATEGORIES]
        figures["accuracy_by_category.png"] = plot_groups(largest, "category")
    for name, figure in figures.items():
        figure.savefig(directory / name, dpi=110)
    return list(figures)


def plot_rewards(columns: Columns) -> Figure:
    """Distributions of the chosen and rejected rewards."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    sides = [columns["chosen_reward"], columns["rejected_reward"]]
    edges = np.histogram_bin_edges(np.concatenate(sides), bins=40)
    axes.hist(sides[0], edges, alpha=0.5, label="chosen")
    axes.hist(sides[1], edges, alpha=0.5, label="rejected")
    axes.set(xlabel="reward", ylabel="answers", title="Rewards")
    axes.legend()
    return figure


def plot_reliability(bins: Sequence[dict[str, float]], ece: float) -> Figure:
    """Accuracy against confidence with Wilson intervals; on the diagonal the model knows how sure it may be."""
    figure = Figure(figsize=(5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], color="gray", linestyle="--", linewidth=1, label="calibrated")
    draw_accuracies(axes, [each["confidence"] for each in bins], bins, fmt="o-")
    axes.set(xlabel="confidence, sigmoid(|margin|)", ylabel="accuracy", title=f"Calibration, ECE {ece:.3f}")
    axes.legend()
    return figure


def plot_groups(groups: Sequence[dict[str, Any]], label: str) -> Figure:
    """Accuracy of each group with Wilson intervals, beside the longer-wins baseline."""
    figure = Figure(figsize=(max(5, 1.3 * len(groups)), 4), layout="constrained")
    axes = figure.subplots()
    places = range(len(groups))
    draw_accuracies(axes, places, groups, fmt="o")
    axes.plot(places, [each["longer_wins"] for each in groups], "_", markersize=18, color="gray", label="longer wins")
    axes.axhline(0.5, color="gray", linestyle=":", linewidth=1)
    axes.set_xticks(places, [f"{each['group']}\nn = {each['n']:,}" for each in groups], parse_math=False)
    axes.set(xlabel=label, ylabel="accuracy", ylim=(0, 1.02))
    axes.legend()
    return figure


def draw_accuracies(axes, places: Sequence[float], groups: Sequence[dict[str, Any]], fmt: str) -> None:
    accuracies = np.array([each["accuracy"] for each in groups])
    bounds = np.array([wilson_interval(each["accuracy"] * each["n"], each["n"]) for each in groups]).T
    axes.errorbar(places, accuracies, np.abs(bounds - accuracies), fmt=fmt, capsize=3, label="reward model")


def plot_against_length(columns: Columns) -> Figure:
    """Reward against length, and within pairs margin against difference in length."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    answers, differences = figure.subplots(1, 2)
    for side in ("chosen", "rejected"):
        answers.plot(columns[f"{side}_length"], columns[f"{side}_reward"], ".", markersize=3, alpha=0.5, label=side)
    answers.set(xlabel="characters", ylabel="reward", xscale="symlog", title="Reward and length")
    answers.legend(markerscale=4)
    extra = columns["chosen_length"] - columns["rejected_length"]
    differences.plot(extra, columns["chosen_reward"] - columns["rejected_reward"], ".", markersize=3, alpha=0.5)
    differences.axhline(0, color="gray", linewidth=1)
    differences.axvline(0, color="gray", linewidth=1)
    differences.set(
        xlabel="characters that the chosen answer is longer",
        ylabel="margin",
        xscale="symlog",
        title="Margin and difference in length",
    )
    return figure


def evaluation_directory(output: str | Path | None):
    """Context of `replace_directory` for the files of an evaluation; None stays None.

    Opened before the scoring, so that a directory that can not be written is found before the work is done.

    Raises:
        InputError: the directory holds anything else, such as a model.
    """
    if not output:
        return contextlib.nullcontext()
    others = sorted({path.name for path in Path(output).glob("*")} - OUTPUT_FILES)
    if others:
        raise InputError(f"{output}: holds other files ({others[0]}) and would be replaced; choose another directory")
    return replace_directory(output, marker="rewards.csv")


def write_evaluation(columns: Columns, metrics: dict[str, Any], directory: Path) -> list[str]:
    """`rewards.csv`, a row a pair, and `plots/` of one evaluation; returns the names of the plots."""
    (directory / "plots").mkdir()
    with replace_file(directory / "rewards.csv") as file:
        pandas.DataFrame(columns).to_csv(file, index=False)
    return plot_evaluation(columns, metrics, directory / "plots")


def model_card(
    metrics: dict[str, Any], settings: dict[str, Any], metadata: dict[str, Any], plots: Sequence[str]
) -> str:
    """README.md of a trained model: numbers and pictures first, then how they came about and how to use it.

    Args:
        metrics: `pair_metrics` on the validation split, with the training's own figures.
        settings: resolved settings of the training.
        metadata: of the processed data.
        plots: names of the pictures in `plots/`.
    """
    pictures = "\n".join(f"![{Path(name).stem.replace('_', ' ')}](plots/{name})" for name in plots)
    return f"""---
library_name: transformers
pipeline_tag: text-classification
tags: [reward-model, trl, reward-trainer]
---
# Reward model

A one-label sequence classifier that scores how good an answer to a prompt is. Higher is better; only differences
between answers to one prompt have a meaning.

| on the validation split | |
|---|---|
| pairs / prompts, all unseen in training | {metrics["n"]:,} / {metrics["prompts"]:,} |
| accuracy, ties half | **{metrics["accuracy"]:.3f}** (95 % interval {intervals(metrics)}) |
| baseline: the longer answer wins | {metrics["longer_wins"]:.3f} |
| gain over it | {metrics["gain_over_longer_wins"]:+.3f} ({span(metrics["gain_over_longer_wins_interval"])}) |
| accuracy where the chosen answer is the shorter one | {number(metrics["shorter_chosen_accuracy"])} \
({span(metrics["shorter_chosen_interval"])}, n = {metrics["shorter_chosen_n"]:,}) |
| expected calibration error, Brier score | {metrics["ece"]:.3f}, {metrics["brier"]:.3f} |
| mean margin | {metrics["mean_margin"]:.3f} |
| reward mean, standard deviation | {metrics["reward_mean"]:.3f}, {metrics["reward_std"]:.3f} |
| rank correlation with length: rewards, margins | {number(metrics["spearman_reward_length"])}, \
{number(metrics["spearman_margin_length"])} |

The weights are the best of {metrics["candidates"]} checkpoint(s), chosen on up to
{settings["max_eval_samples"]} of these pairs: with several of them the accuracy is slightly optimistic.

{pictures}

## Origin
- base model: {settings["base_model"]}{", by LoRA, merged" if settings["use_peft"] else ""}
- data: {metadata["source"]}; {metrics["train_pairs"]:,} training pairs of at most {metadata["max_length"]} tokens
- {metrics["updates"]:,} updates of {metrics["pairs_per_update"]} pairs, learning rate {settings["learning_rate"]},
  {settings["num_train_epochs"]} epoch(s), centering {settings["center_rewards_coefficient"]}, seed {settings["seed"]};
  all settings in `settings.json`
- {metrics["train_seconds"]:,.0f} s in updates on {metrics["device"]}

## Use
```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForSequenceClassification.from_pretrained(".")
messages = [{{"role": "user", "content": "What is 2 + 2?"}}, {{"role": "assistant", "content": "4"}}]
inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
print(model(**inputs).logits.item())
```

## Limits
Reads {metadata["max_length"]} tokens: of a longer answer only the beginning counts, of a longer prompt start and end.
A small model: expect it to notice form, topic and language before facts.
"""


# --- the stages, in order --------------------------------------------------------------------------------------------


def evaluate_sources(
    evaluator: RewardModelEvaluator, models: Sequence[str], sources: dict[str, Dataset]
) -> tuple[dict[str, Any], Columns]:
    """Score every source; returns the content of `metrics.json` and the columns of all pairs."""
    scored = {name: score_pairs(evaluator, pairs, name) for name, pairs in sources.items()}
    total = join_columns([columns for columns, _ in scored.values()])
    margins = np.concatenate([margins for _, margins in scored.values()], axis=1)
    files = {name: pair_metrics(columns) for name, (columns, _) in scored.items()}
    results = {
        "models": list(models),
        "members": {
            model: accuracy_with_interval(wins(each, np.zeros_like(each)))
            for model, each in zip(models, margins, strict=True)
        },
        "files": files,
        "total": pair_metrics(total) if len(files) > 1 else next(iter(files.values())),
    }
    return results, total


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", nargs="+", default=[MODEL_PATH], metavar="DIR", help="reward model; several are an ensemble"
    )
    parser.add_argument(
        "--pairs", nargs="+", default=[PAIRS], metavar="SOURCE", help="processed directories or sources of pairs"
    )
    parser.add_argument("--split", help="split of a dataset repository or processed directory")
    parser.add_argument("--output", metavar="DIR", help="directory for figures and plots, replaced as a whole")
    options = parser.parse_args()
    for name in ("model", "pairs"):
        if len(set(getattr(options, name))) < len(getattr(options, name)):
            parser.error(f"--{name} names a place twice")
    return options


def main() -> None:
    options = parse_options()
    check_split(options.pairs, options.split)
    sources = {name: read_pairs(name, options.split) for name in options.pairs}
    evaluator = RewardModelEvaluator(options.model, mixed_precision=True)
    for pairs in sources.values():
        check_templates(evaluator, pairs["prompt"], pairs["place"])
    with evaluation_directory(options.output) as directory:
        results, columns = evaluate_sources(evaluator, options.model, sources)
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
