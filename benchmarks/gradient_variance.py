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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.reinforce_speed import Run, open_run
from reward_pipeline import reinforce, rollouts
from reward_pipeline.devices import autocast_dtype
from reward_pipeline.evaluator import RewardModelEvaluator
from reward_pipeline.files import InputError, write_text
from reward_pipeline.policy_metrics import load_judge
from reward_pipeline.processed import load_processed
from reward_pipeline.processes import run_script
from reward_pipeline.sampling import sample
from reward_pipeline.settings import Parser, filled_text, whole

RESAMPLES = 2000


def read_run(directory: Path) -> tuple[argparse.Namespace, dict[str, float]]:
    """Options of a finished run and the state of its baseline after the last update.

    Raises:
        InputError: not a finished run.
    """
    try:
        options = argparse.Namespace(**json.loads((directory / "settings.json").read_text(encoding="utf-8")))
        log = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        state: dict[str, float] = {}
        for entry in log:
            state = reinforce.updated_baseline(state, entry["reward"], options.ema_decay)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{directory}: no finished run here; run train_reinforce.py first") from error
    return options, state


def computing_type(device: torch.device) -> torch.dtype | None:
    """As in `train_reinforce.py`, which takes no fp16."""
    return torch.bfloat16 if autocast_dtype(device) is torch.bfloat16 else None


def gradients(
    run: Run,
    judge: RewardModelEvaluator,
    options: argparse.Namespace,
    prompts: Sequence[rollouts.PolicyPrompt],
    rollout: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """g(0) and h, (P,) each, of one completion of the batch, as `train_reinforce.py` takes its gradient."""
    device, parameters = run.policy.device, list(run.policy.parameters())
    dtype, seeds = computing_type(device), reinforce.random_seeds(len(prompts), options.seed, 0, rollout)
    completions = sample(run.policy, run.tokenizer, prompts, run.sampling, dtype, seeds)
    scores = judge.reward_function([prompt.messages for prompt in prompts], completions.texts)
    scores = torch.tensor(scores, dtype=torch.float32, device=device)
    totals = torch.zeros(2, sum(each.numel() for each in parameters), device=device)
    for start in range(0, len(prompts), options.micro_batch_size):
        part = completions.part(start, options.micro_batch_size)
        likely = reinforce.token_distributions(run.policy, part, options.temperature, dtype)
        log_probs = reinforce.log_probabilities(likely, part)
        with torch.no_grad():
            likely = reinforce.token_distributions(run.reference, part, options.temperature, dtype)
            others = reinforce.log_probabilities(likely, part)
        kl = reinforce.sequence_kl(log_probs.detach(), others, part.mask)
        part_scores = scores[start : start + len(part.texts)]
        rewards = reinforce.regularised_rewards(
            part_scores, kl, part.ended, options.kl_coefficient, options.missing_eos_penalty
        )
        # One forward pass serves both.
        for total, advantages in zip(totals, (rewards, torch.ones_like(rewards)), strict=True):
            loss = reinforce.reinforce_loss(log_probs, part.mask, advantages) * len(part.texts) / len(prompts)
            parts = torch.autograd.grad(loss, parameters, retain_graph=True)
            total += torch.cat([each.flatten() for each in parts])
    return totals[0], totals[1]


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
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="directory of train_reinforce.py")
    parser.flag("rollouts", 16, whole(2), "completions of the batch")
    parser.flag("output", None, filled_text, "JSON file for the figures", metavar="FILE")
    given = parser.parse_args()
    options, state = read_run(given.run)
    run = open_run(options, policy=str(given.run))
    lengths = options.max_prompt_length, options.max_new_tokens
    validation = load_processed(options.data)[0]["validation"]
    judge = load_judge("reward_model", options.reward_model, run.prompts, *lengths, run.policy.device, validation)
    prompts = next(rollouts.batches(run.prompts, options.completions_per_step, options.seed))
    prompts = sorted(prompts, key=lambda prompt: len(prompt.ids))  # micro-batches then have little padding
    numbers = tqdm(range(given.rollouts), desc="Rollouts")
    rows, sums = products(gradients(run, judge, options, prompts, number) for number in numbers)
    baselines = {
        kind: reinforce.baseline_value(kind, state, 0.0, options.ema_decay) for kind in ("none", "mean", "ema")
    }
    result = figures(rows, sums, baselines | {"best constant": best_baseline(rows, sums)})
    header = ["baseline", "value", "variance", "ratio", "ratio of squared norms (95 %)"]
    table = [
        [name, f"{each['baseline']:+.3f}", f"{each['variance']:.4g}", f"{each['ratio']:.3f}",
         "{:.3f} to {:.3f}".format(*each["squared_norm_ratio_interval"])]
        for name, each in result.items()
    ]  # fmt: skip
    print(tabulate(table, header, tablefmt="github", disable_numparse=True))
    if given.output:
        write_text(given.output, json.dumps({"rollouts": given.rollouts, **result}, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
