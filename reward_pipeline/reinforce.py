"""REINFORCE with a moving-average baseline (arXiv 2402.14740): pure functions."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from reward_pipeline.files import InputError, named

REMEDY = "the checkpoints before it are kept; start over with a lower --learning_rate or a higher --kl_coefficient"


class DivergedError(InputError):
    """The policy is spoiled: by the update before the one in which this is found."""


def completion_mask(completions: torch.Tensor, end_ids: Sequence[int]) -> torch.Tensor:
    """(B, T) bool, true up to and including the first end token; what `generate` padded after it is false.

    An end token that is also the pad token is therefore counted once.
    """
    ends = torch.isin(completions, torch.tensor(end_ids, device=completions.device))
    return (ends.cumsum(dim=1) - ends.long()) == 0


def has_ended(completions: torch.Tensor, end_ids: Sequence[int]) -> torch.Tensor:
    """(B,) bool, whether an end token occurs."""
    return torch.isin(completions, torch.tensor(end_ids, device=completions.device)).any(dim=1)


def distributions(
    model, ids: torch.Tensor, attention_mask: torch.Tensor, length: int, temperature: float
) -> torch.Tensor:
    """Log-probabilities of every token at every place of the completions.

    Args:
        ids: (B, P + T) prompts padded on the left, then completions padded on the right.
        attention_mask: (B, P + T), 0 on the padding.
        length: T, tokens of the completions.
        temperature: that of the sampling; the logits are divided by it.

    Returns:
        (B, T, V) fp32, in nats; after the end of a completion they have no meaning.
    """
    positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(
        input_ids=ids, attention_mask=attention_mask, position_ids=positions, use_cache=False, logits_to_keep=length + 1
    ).logits
    # The logits at one position are those of the next token.
    return (logits[:, :-1].float() / temperature).log_softmax(dim=-1)


def of_tokens(log_probs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(B, T) log-probabilities of the sampled tokens, from (B, T, V) of all and ids (B, P + T)."""
    return log_probs.gather(2, ids[:, -log_probs.shape[1] :, None]).squeeze(2)


def entropies(log_probs: torch.Tensor) -> torch.Tensor:
    """(B, T) entropy of each of the (B, T, V) distributions, in nats."""
    return torch.special.entr(log_probs.exp()).sum(dim=2)


def sequence_kl(log_probs: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B,) single-sample estimate of KL(policy || reference) of each completion: summed log-ratio, in nats.

    Args:
        log_probs, reference: (B, T) log-probabilities of the sampled tokens.
        mask: (B, T) bool.
    """
    return (log_probs - reference).masked_fill(~mask, 0).sum(dim=1)


def regularised_rewards(
    scores: torch.Tensor, kl: torch.Tensor, ended: torch.Tensor, kl_coefficient: float, missing_eos_penalty: float
) -> torch.Tensor:
    """(B,) R: score minus the KL term minus the penalty of completions that did not end; without gradient."""
    return scores - kl_coefficient * kl.detach() - missing_eos_penalty * (~ended).float()


def reinforce_loss(log_probs: torch.Tensor, mask: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Scalar whose gradient is the REINFORCE estimate: -mean_i(advantage_i * sum_t log pi(y_it)).

    Args:
        log_probs: (B, T) with gradient.
        mask: (B, T) bool.
        advantages: (B,) without gradient.
    """
    return -(advantages.detach() * log_probs.masked_fill(~mask, 0).sum(dim=1)).mean()


def baseline_value(kind: str, state: dict[str, float], first: float, ema_decay: float) -> float:
    """b for the coming step.

    Args:
        kind: "mean" of the mean rewards of all previous steps (arXiv 2402.14740, Eq. 8), their exponential moving
            average "ema" with bias correction (arXiv 1412.6980), or "none" for 0.
        state: of `updated_baseline`; empty before the first step.
        first: mean reward of the first step, its own baseline, since nothing came before it.
    """
    if kind == "none":
        return 0.0
    if not state:
        return first
    if kind == "mean":
        return state["total"] / state["steps"]
    return state["average"] / (1 - ema_decay ** state["steps"])


def updated_baseline(state: dict[str, float], reward: float, ema_decay: float) -> dict[str, float]:
    """The state with the mean reward of one more step."""
    before = state or {"steps": 0, "total": 0.0, "average": 0.0}
    return {
        "steps": before["steps"] + 1,
        "total": before["total"] + reward,
        "average": ema_decay * before["average"] + (1 - ema_decay) * reward,
    }


def step_seed(seed: int, step: int, part: int) -> int:
    """Seed of the random numbers of a step (0: the evaluation) in a process, or of a batch of the evaluation.

    They follow from these numbers alone, so a resumed run draws what an undisturbed one would have drawn.
    """
    return int(np.random.SeedSequence([seed, step, part]).generate_state(1)[0])


def warmed_up(learning_rate: float, warmup_steps: int, step: int) -> float:
    """Linear warm-up, then constant; `step` counts from 1."""
    return learning_rate * min(1.0, step / max(warmup_steps, 1))


def step_figures(sums: dict[str, float], baseline: float) -> dict[str, float]:
    """What is logged of an update, from sums over all its completions; see `accumulate_gradient`.

    Returns:
        Means over completions: `score` by the reward model and its `score_std`, `reward` R and `advantage_std` of
        R - baseline, `kl` (nats to the reference), `length` (tokens), `ended` (share); means over tokens:
        `kl_per_token`, `entropy`; and `baseline`.
    """
    n, tokens = sums["completions"], sums["tokens"]
    score, reward = sums["score"] / n, sums["reward"] / n
    return {
        "score": score,
        "score_std": math.sqrt(max(sums["score_squared"] / n - score**2, 0)),
        "reward": reward,
        "baseline": baseline,
        "advantage_std": math.sqrt(max(sums["reward_squared"] / n - reward**2, 0)),
        "kl": sums["kl"] / n,
        "kl_per_token": sums["kl"] / tokens,
        "entropy": sums["entropy"] / tokens,
        "length": tokens / n,
        "ended": sums["ended"] / n,
    }


def check_figures(figures: dict[str, float], step: int, max_kl: float, places: Sequence[str] = ()) -> None:
    """Stop before an update that starts from a spoiled policy, or would spoil it.

    Args:
        places: of the prompts whose R is not finite.

    Raises:
        DivergedError: a figure is not finite, or the policy is too far from the reference.
    """
    for name, value in figures.items():
        if not math.isfinite(value):
            raise DivergedError(f"update {step}: {name} is {value}{named(places)}; {REMEDY}")
    if figures["kl"] > max_kl:
        kl = f"{figures['kl']:.1f} nats, above --max_kl {max_kl}"
        raise DivergedError(f"update {step}: the mean KL is {kl}; {REMEDY}")
