"""Figures become pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import DatasetDict
from matplotlib.figure import Figure

from reward_pipeline.pair_metrics import Columns
from reward_pipeline.policy_metrics import Answers
from reward_pipeline.processed import LENGTH_COLUMNS, whole_columns
from reward_pipeline.statistics import wilson_interval

PLOTTED_CATEGORIES = 20  # at most, the largest ones


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


def plot_lengths(splits: DatasetDict, max_length: int, path: Path) -> None:
    """Histogram of prompt and response lengths before the cut."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    tables = [whole_columns(split, LENGTH_COLUMNS) for split in splits.values()]
    values = {
        name.removesuffix("_length"): np.concatenate([table[name] for table in tables]) for name in LENGTH_COLUMNS
    }
    last = max(np.percentile(lengths, 99) for lengths in values.values())
    for label, lengths in values.items():
        axes.hist(lengths, bins=np.linspace(0, max(last, max_length) * 1.02, 60), histtype="step", label=label)
    axes.axvline(max_length, color="black", linestyle="--", linewidth=1, label=f"max_length {max_length}")
    axes.set(
        xlabel="tokens before the cut (up to the 99th percentile)",
        ylabel="pairs",
        title="Lengths of prompts and responses",
    )
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_curves(history: list[dict[str, float]], path: Path) -> None:
    """Loss, validation accuracy, learning rate and gradient norm against updates."""
    panels = {
        "loss": {"loss": "train", "eval_loss": "validation"},
        "accuracy": {"accuracy": "train", "eval_pair_accuracy": "validation"},
        "learning rate": {"learning_rate": "learning rate"},
        "gradient norm": {"grad_norm": "before clipping"},
    }
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axis, (title, series) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for key, label in series.items():
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            axis.plot(*zip(*points, strict=True) if points else ((), ()), marker=".", label=label)
        axis.set(title=title, xlabel="updates")
        axis.legend()
    figure.savefig(path, dpi=120)


def plot_steps(log: Sequence[dict[str, float]], path: Path) -> None:
    """Reward, KL, length and entropy against steps."""
    panels = {
        "reward (standard deviations)": {"score": "reward model", "baseline": "baseline"},
        "KL to the SFT model (nats)": {"kl": "whole completion"},
        "length (tokens)": {"length": "mean"},
        "entropy (nats per token)": {"entropy": "mean"},
    }
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (title, series) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for key, label in series.items():
            axes.plot([entry["step"] for entry in log], [entry[key] for entry in log], label=label)
        axes.set(title=title, xlabel="updates")
        axes.legend()
    figure.savefig(path, dpi=120)


def plot_before_and_after(before: Answers, after: Answers, judged: dict[str, Any], path: Path) -> None:
    """Distributions of reward and length on the evaluation prompts."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    rewards, lengths = figure.subplots(1, 2)
    for axes, label, values in (
        (rewards, "reward (standard deviations)", (judged["rewards_before"], judged["rewards_after"])),
        (lengths, "length (tokens)", (before.lengths, after.lengths)),
    ):
        edges = np.histogram_bin_edges(np.concatenate(values), bins=30)
        for name, each in zip(("SFT", "aligned"), values, strict=True):
            axes.hist(each, edges, alpha=0.5, label=name)
        axes.set(xlabel=label, ylabel="answers")
        axes.legend()
    figure.savefig(path, dpi=120)
