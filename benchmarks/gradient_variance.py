"""Variance of the REINFORCE gradient under the three baselines, on one fixed batch of prompts.

In:  a directory that `train_reinforce.py` wrote: its policy, its settings and its log.
Out: a table on the terminal and, with `--output`, a JSON file.

    python benchmarks/gradient_variance.py reinforce_output --rollouts 16 --output variance.json

The batch is completed again and again, and each time the gradient is taken. Since the gradient is linear in the
baseline, g(b) = g(0) - b * h with h the gradient for all rewards equal to 1, the same completions serve for every b.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_reinforce
from load_helpsteer_dataset import load_processed
from load_smollm_model import InputError, resolve_model, run_script, write_text
from train_reinforce import Run, Settings, baseline_value, updated_baseline

RESAMPLES = 2000


def read_run(directory: Path) -> tuple[Settings, dict[str, float]]:
    """Settings of a finished run and the state of its baseline after the last update.

    Raises:
        InputError: not a finished run.
    """
    try:
        saved = json.loads((directory / "settings.json").read_text(encoding="utf-8"))
        log = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{directory}: no finished run here; run train_reinforce.py first") from error
    state: dict[str, float] = {}
    for entry in log:
        state = updated_baseline(state, entry["reward"])
    settings = Settings(**{name: saved[name] for name in vars(Settings())})
    return replace(settings, report_to="none"), state


def flat_gradient(policy) -> torch.Tensor:
    """(P,) gradient of all parameters, which is then cleared."""
    gradient = torch.cat([each.grad.flatten() for each in policy.parameters() if each.grad is not None])
    policy.zero_grad()
    return gradient


def gradients(run: Run, prompts: Sequence, rollout: int) -> tuple[torch.Tensor, torch.Tensor]:
    """g(0) and h of one completion of the batch."""
    policy = run.accelerator.unwrap_model(run.policy)
    seed = train_reinforce.step_seed(run.settings.seed, 0, rollout)
    completions = train_reinforce.sample(policy, run.tokenizer, prompts, run.sampling, run.dtype, seed)
    scores = run.evaluator.get_reward_scores([prompt.messages for prompt in prompts], completions.texts)
    scores = torch.tensor(scores, dtype=torch.float32, device=policy.device)
    train_reinforce.accumulate_gradient(run, completions, scores, 0.0)
    without = flat_gradient(policy)
    train_reinforce.accumulate_gradient(run, completions, scores, -1.0)
    return without, flat_gradient(policy) - without


def products(pairs) -> tuple[np.ndarray, np.ndarray]:
    """Inner products of the gradients (g, h) of M rollouts, held one at a time.

    Returns:
        (M, 3) of each rollout: g·g, g·h, h·h; and (3,) of the sums over the rollouts.
    """
    rows, sums = [], None
    for pair in pairs:
        rows.append(three_products(*pair))
        sums = pair if sums is None else tuple(total.add_(each) for total, each in zip(sums, pair, strict=True))
    return np.array(rows), np.array(three_products(*sums))


def three_products(g: torch.Tensor, h: torch.Tensor) -> list[float]:
    return [float(a @ b) for a, b in ((g, g), (g, h), (h, h))]


def squared_norm(products: np.ndarray, baseline: float) -> np.ndarray:
    """|g - b h|^2 from (..., 3) inner products."""
    return products @ np.array([1.0, -2.0 * baseline, baseline**2])


def variance(rows: np.ndarray, sums: np.ndarray, baseline: float) -> float:
    """Trace of the covariance of g(b) over M rollouts, unbiased."""
    m = len(rows)
    return float((squared_norm(rows, baseline).sum() - squared_norm(sums, baseline) / m) / (m - 1))


def best_baseline(rows: np.ndarray, sums: np.ndarray) -> float:
    """The constant that minimises `variance`, which is a parabola in b."""
    _, gh, hh = rows.sum(axis=0) - sums / len(rows)
    return float(gh / hh)


def ratio_interval(rows: np.ndarray, baseline: float) -> list[float]:
    """95 % bootstrap interval over rollouts of E|g(b)|^2 / E|g(0)|^2."""
    drawn = np.random.default_rng(0).integers(len(rows), size=(RESAMPLES, len(rows)))
    ratios = squared_norm(rows, baseline)[drawn].mean(axis=1) / squared_norm(rows, 0.0)[drawn].mean(axis=1)
    return [float(bound) for bound in np.percentile(ratios, [2.5, 97.5])]


def figures(rows: np.ndarray, sums: np.ndarray, baselines: dict[str, float]) -> dict[str, Any]:
    """Baseline, variance of the gradient, and its share of the variance without a baseline, for each kind."""
    without = variance(rows, sums, 0.0)
    return {
        name: {
            "baseline": value,
            "variance": variance(rows, sums, value),
            "ratio": variance(rows, sums, value) / without,
            "squared_norm_ratio_interval": ratio_interval(rows, value),
        }
        for name, value in baselines.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of train_reinforce.py")
    parser.add_argument("--rollouts", type=int, default=16, help="completions of the batch (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    if options.rollouts < 2:
        parser.error("--rollouts must be at least 2")
    settings, state = read_run(options.run)
    splits, _ = load_processed(settings.data)
    accelerator = train_reinforce.build_accelerator(settings)
    sft = resolve_model(settings.model).path
    run = train_reinforce.build_run(settings, accelerator, splits, sft)
    train_reinforce.load_policy(run, options.run)
    prompts = next(train_reinforce.batches(run.prompts, settings.completions_per_step, settings.seed))
    prompts = sorted(prompts, key=lambda prompt: len(prompt.ids))
    rollouts = tqdm(range(options.rollouts), desc="Rollouts")
    rows, sums = products(gradients(run, prompts, rollout) for rollout in rollouts)
    baselines = {kind: baseline_value(kind, state, 0.0) for kind in ("none", "mean", "ema")}
    result = figures(rows, sums, baselines | {"best constant": best_baseline(rows, sums)})
    header = ["baseline", "value", "variance", "ratio", "ratio of squared norms (95 %)"]
    table = [
        [name, f"{each['baseline']:+.3f}", f"{each['variance']:.4g}", f"{each['ratio']:.3f}",
         "{:.3f} to {:.3f}".format(*each["squared_norm_ratio_interval"])]
        for name, each in result.items()
    ]  # fmt: skip
    print(tabulate(table, header, tablefmt="github", disable_numparse=True))
    if options.output:
        write_text(options.output, json.dumps({"rollouts": options.rollouts, **result}, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
