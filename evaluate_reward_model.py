"""How good a reward model is on preference pairs: accuracy with interval, beside the longer-wins baseline.

In:  a trained reward model and pairs: `processed_helpsteer/` (its validation split) or any source that
     `load_helpsteer_dataset.py` reads.
Out: the figures on the terminal and, with `--output`, in a JSON file.

    python evaluate_reward_model.py
    python evaluate_reward_model.py --model reward_model_output --pairs my_pairs.jsonl --output metrics.json
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from conversations import Messages
from load_helpsteer_dataset import (
    OUTPUT_DIR,
    checked_pairs,
    load_processed,
    longer_wins,
    open_source,
    pick_split,
)
from load_smollm_model import InputError, run_script, write_text
from reward_model_demo import MODEL_PATH, RewardModelEvaluator

# ---------------------------------------------------------------------------------------------------------------------
PAIRS = OUTPUT_DIR  # processed directory, or any source of pairs
BATCH_SIZE = 16  # conversations scored at once
# ---------------------------------------------------------------------------------------------------------------------

Z_95 = 1.959964  # standard normal quantile of a two-sided 95 % interval
TIE = 1e-6  # rewards of one and the same input can differ by rounding, depending on its place in the batch


def wilson_interval(successes: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927); `successes` may count ties as half."""
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def wins(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """(N,) 1 where the chosen reward is higher, 0.5 where both are equal up to `TIE`, else 0."""
    margin = np.asarray(chosen, float) - np.asarray(rejected, float)
    return np.where(np.abs(margin) <= TIE, 0.5, (margin > 0).astype(float))


def accuracy_with_interval(pair_wins: np.ndarray) -> dict[str, Any]:
    """n, mean of the wins (None without pairs) and its Wilson 95 % interval."""
    n = len(pair_wins)
    interval = [round(bound, 4) for bound in wilson_interval(float(pair_wins.sum()), n)]
    return {"n": n, "accuracy": round(float(pair_wins.mean()), 4) if n else None, "accuracy_interval": interval}


def pair_metrics(
    chosen_rewards: Sequence[float], rejected_rewards: Sequence[float], chosen: Sequence[str], rejected: Sequence[str]
) -> dict[str, Any]:
    """Figures for N pairs.

    Args:
        chosen_rewards, rejected_rewards: (N,) rewards of the two answers of each pair.
        chosen, rejected: (N,) their texts, for the comparison with length.

    Returns:
        `n`, `accuracy` (ties half), `accuracy_interval`, `ties`, `longer_wins` (accuracy of preferring the longer
        text), `shorter_chosen` (the accuracy where the chosen text is the shorter one: n, accuracy, interval),
        `mean_margin`, `reward_mean` and `reward_std` over all 2 N answers.
    """
    chosen_rewards, rejected_rewards = np.asarray(chosen_rewards, float), np.asarray(rejected_rewards, float)
    pair_wins = wins(chosen_rewards, rejected_rewards)
    shorter = np.array([len(a.strip()) < len(b.strip()) for a, b in zip(chosen, rejected, strict=True)], dtype=bool)
    rewards = np.concatenate([chosen_rewards, rejected_rewards])
    return {
        **accuracy_with_interval(pair_wins),
        "ties": int((pair_wins == 0.5).sum()),
        "longer_wins": round(longer_wins(chosen, rejected), 4),
        "shorter_chosen": accuracy_with_interval(pair_wins[shorter]),
        "mean_margin": round(float((chosen_rewards - rejected_rewards).mean()), 4),
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
    }


def evaluate_pairs(
    evaluator: RewardModelEvaluator, prompts: Sequence[Messages], chosen: Sequence[str], rejected: Sequence[str]
) -> dict[str, Any]:
    """Score both answers of N pairs; see `pair_metrics`."""
    rewards = evaluator.get_reward_scores([*prompts, *prompts], [*chosen, *rejected], BATCH_SIZE, progress=True)
    return pair_metrics(rewards[: len(prompts)], rewards[len(prompts) :], chosen, rejected)


def read_pairs(name: str, split: str | None = None) -> Dataset:
    """Pairs of a processed directory (its validation split) or of any source, without the unusable rows."""
    if (Path(name) / "metadata.json").is_file():
        splits, _ = load_processed(name)
        return splits[pick_split(name, list(splits), split or "validation")]
    found = [pair for _, pair, _ in checked_pairs(open_source(name, split).rows)]
    pairs = [pair for pair in found if pair]
    dropped = len(found) - len(pairs)
    if not pairs:
        raise InputError(f"{name}: no usable pair in {dropped} rows; load_helpsteer_dataset.py names the reasons")
    if dropped:
        print(f"{name}: {dropped:,} unusable rows left out (load_helpsteer_dataset.py names the reasons)")
    return Dataset.from_list(pairs)


def summary(metrics: dict[str, Any]) -> str:
    """The figures in one line."""
    low, high = metrics["accuracy_interval"]
    return (
        f"accuracy {metrics['accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f}, n = {metrics['n']:,}; "
        f"longer wins: {metrics['longer_wins']:.3f})"
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL_PATH, help="directory of the reward model (default: %(default)s)")
    parser.add_argument("--pairs", default=PAIRS, help="processed directory or source of pairs (default: %(default)s)")
    parser.add_argument("--split", help="split of a dataset repository or processed directory")
    parser.add_argument("--output", help="JSON file for the figures")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    pairs = read_pairs(options.pairs, options.split)
    evaluator = RewardModelEvaluator(options.model, mixed_precision=True)
    metrics = evaluate_pairs(evaluator, pairs["prompt"], pairs["chosen"], pairs["rejected"])
    print(json.dumps(metrics, indent=2))
    print(summary(metrics))
    if options.output:
        write_text(options.output, json.dumps({**metrics, "pairs": options.pairs}, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
