"""REINFORCE with a moving-average baseline (Ahmadian et al. 2024, arXiv 2402.14740): the algorithm as pure functions.

Shapes: B completions of at most T tokens after prompts of at most P tokens, over a vocabulary of V. Log-probabilities,
KL and entropies are fp32, in nats.
"""

import contextlib
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from reward_pipeline.devices import autocast
from reward_pipeline.files import InputError, at_places

REMEDY = (
    "the checkpoints before it are kept; start over (--fresh) with a lower --learning_rate or a higher --kl_coefficient"
)


class DivergedError(InputError):
    """The policy is spoiled: by the update before the one in which this is found."""


@contextlib.contextmanager
def without_spoiled_checkpoint(checkpoints: Path, log: Sequence[dict], is_first: bool) -> Iterator[None]:
    """When the block finds the policy spoiled, remove the checkpoint after the last update in `log`, if there is one.

    That update spoiled it, so no run may go on from there.

    Args:
        is_first: whether this process is the one that removes.
    """
    try:
        yield
    except DivergedError:
        if is_first:
            shutil.rmtree(checkpoints / f"checkpoint-{len(log)}", ignore_errors=True)
        raise


# --- completions and their log-probabilities -------------------------------------------------------------------------


class Completions(NamedTuple):
    """B sampled completions with their prompts."""

    ids: torch.Tensor  # (B, P + T) int64, prompts padded on the left, completions on the right
    attention_mask: torch.Tensor  # (B, P + T) int64, 0 left of the prompt and after the end of the completion
    mask: torch.Tensor  # (B, T) bool, the completion up to and including its end token
    ended: torch.Tensor  # (B,) bool
    texts: list[str]

    def part(self, start: int, size: int) -> "Completions":
        """At most `size` of the rows, without the columns that are padding in all of them."""
        rows = slice(start, min(start + size, len(self.texts)))
        used = self.attention_mask[rows].any(dim=0).nonzero()
        columns = slice(int(used[0]), int(used[-1]) + 1)
        unused = self.ids.shape[1] - columns.stop
        return Completions(
            self.ids[rows, columns],
            self.attention_mask[rows, columns],
            self.mask[rows, : self.mask.shape[1] - unused],
            self.ended[rows],
            self.texts[rows],
        )


def completion_mask(completions: torch.Tensor, end_ids: Sequence[int]) -> torch.Tensor:
    """(B, T) bool, true up to and including the first end token of (B, T) ids; what was padded after it is false.

    An end token that is also the pad token is therefore counted once.
    """
    ends = torch.isin(completions, torch.tensor(end_ids, device=completions.device))
    return (ends.cumsum(dim=1) - ends.long()) == 0


def has_ended(completions: torch.Tensor, end_ids: Sequence[int]) -> torch.Tensor:
    """(B,) bool, whether an end token occurs in (B, T) ids."""
    return torch.isin(completions, torch.tensor(end_ids, device=completions.device)).any(dim=1)


def token_distributions(
    model: torch.nn.Module, completions: Completions, temperature: float, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """(B, T, V) log-probabilities of every token that could have been sampled at each place of the completions.

    Args:
        model: a causal language model of `transformers`, or what accelerate made of one.
        temperature: that of the sampling; the logits are divided by it.
        dtype: of autocast; None computes in fp32.
    """
    ids, attention_mask, mask, _, _ = completions
    # Sampling pads prompts on the left. Here every row begins with its first token: no token is left without any that
    # it may attend to, which on CUDA makes gradients NaN, and positions count as they do without padding.
    starts = attention_mask.argmax(dim=1)
    order = (torch.arange(ids.shape[1], device=ids.device) + starts[:, None]) % ids.shape[1]
    prompt_lengths = ids.shape[1] - mask.shape[1] - starts
    kept = ids.shape[1] - int(prompt_lengths.min()) + 1  # from the last token of the shortest prompt on
    with autocast(ids.device, dtype):
        logits = model(
            input_ids=ids.gather(1, order),
            attention_mask=attention_mask.gather(1, order),
            use_cache=False,
            logits_to_keep=kept,  # the vocabulary is the widest layer: it is not computed for prompts
        ).logits
    # The logits at one place are those of the next token. Softmax in fp32: bf16 has three digits, and two policies that
    # are one update apart differ by less.
    first = (prompt_lengths - prompt_lengths.min()).tolist()
    own = torch.stack([row[start : start + mask.shape[1]] for row, start in zip(logits, first, strict=True)])
    return (own.float() / temperature).log_softmax(dim=-1)


def log_probabilities(distributions: torch.Tensor, completions: Completions) -> torch.Tensor:
    """(B, T) those of the sampled tokens, from the (B, T, V) of `token_distributions`.

    After the end of a completion they have no meaning.
    """
    return distributions.gather(2, completions.ids[:, -distributions.shape[1] :, None]).squeeze(2)


@torch.no_grad()
def entropies(distributions: torch.Tensor) -> torch.Tensor:
    """(B, T) of (B, T, V) distributions, without gradient; after the end of a completion they have no meaning."""
    # `torch.special.entr` takes the logarithm anew, and eight times as long. 0 times a large number is 0, 0 times
    # infinity is not a number.
    return -(distributions.exp() * distributions.clamp(min=torch.finfo(torch.float32).min)).sum(dim=2)


# --- rewards, baseline, loss -----------------------------------------------------------------------------------------


def sequence_kl(log_probs: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B,) single-sample estimate of KL(policy || reference) of each completion: the summed log-ratio.

    Unbiased, and of either sign: the estimator "k1" of http://joschu.net/blog/kl-approx.html.

    Args:
        log_probs, reference: (B, T) log-probabilities of the sampled tokens.
        mask: (B, T) bool.
    """
    return (log_probs - reference).masked_fill(~mask, 0).sum(dim=1)


def regularised_rewards(
    scores: torch.Tensor, kl: torch.Tensor, ended: torch.Tensor, kl_coefficient: float, missing_eos_penalty: float
) -> torch.Tensor:
    """(B,) R: score minus the KL term minus the penalty of completions that did not end; without gradient.

    The KL is a part of the reward, not of the loss: E[R grad log pi] then holds its gradient too, since the expectation
    of the KL's own derivative, E[grad log pi], is 0.
    """
    return scores - kl_coefficient * kl.detach() - missing_eos_penalty * (~ended).float()


def reinforce_loss(log_probs: torch.Tensor, mask: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Scalar whose gradient is the REINFORCE estimate: -mean_i(advantage_i * sum_t log pi(y_it)), Williams 1992.

    A sum over tokens, not a mean: the whole completion is one action, and a mean would prefer long bad ones.

    Args:
        log_probs: (B, T) with gradient.
        mask: (B, T) bool.
        advantages: (B,) without gradient.
    """
    return -(advantages.detach() * log_probs.masked_fill(~mask, 0).sum(dim=1)).mean()


def leave_one_out(rewards: torch.Tensor, completions_per_prompt: int) -> torch.Tensor:
    """(B,) the mean reward of the *other* completions of the same prompt: RLOO's baseline (arXiv 2402.14740, Eq. 9).

    Args:
        rewards: (B,), the completions of a prompt next to each other.
    """
    groups = rewards.view(-1, completions_per_prompt)
    return ((groups.sum(dim=1, keepdim=True) - groups) / (completions_per_prompt - 1)).flatten()


def baseline_value(kind: str, state: dict[str, float], first: float, ema_decay: float) -> float:
    """b for the coming step.

    Args:
        kind: "mean" of the mean rewards of all previous steps (arXiv 2402.14740, Eq. 8), their exponential moving
            average "ema" with bias correction (arXiv 1412.6980), or "none" for 0.
        state: of `updated_baseline`; empty before the first step.
        first: mean reward of the first step, its own baseline, since nothing came before it.
        ema_decay: weight of the average before a step against that of its reward.
    """
    if kind == "none":
        return 0.0
    if not state:
        return first
    if kind == "mean":
        return state["total"] / state["steps"]
    return state["average"] / (1 - ema_decay ** state["steps"])


def updated_baseline(state: dict[str, float], reward: float, ema_decay: float) -> dict[str, float]:
    """The state with the mean reward of one more step; it serves every kind of baseline."""
    before = state or {"steps": 0, "total": 0.0, "average": 0.0}
    return {
        "steps": before["steps"] + 1,
        "total": before["total"] + reward,
        "average": ema_decay * before["average"] + (1 - ema_decay) * reward,
    }


def warmed_up(learning_rate: float, warmup_steps: int, step: int) -> float:
    """Linear warm-up, then constant; `step` counts from 1."""
    return learning_rate * min(1.0, step / max(warmup_steps, 1))


def random_seeds(count: int, *numbers: int) -> list[int]:
    """Seeds of so many completions, from the seed of the run, the step (0: the evaluation) and the process.

    They follow from these numbers alone, so a resumed run draws what an undisturbed one would have drawn.
    """
    return np.random.SeedSequence(numbers).generate_state(count, np.uint64).tolist()


# --- figures ---------------------------------------------------------------------------------------------------------


COLUMNS = ("score", "reward", "advantage", "kl", "entropy", "tokens", "ended")  # of a completion


def completion_figures(
    completions: Completions,
    scores: torch.Tensor,
    rewards: torch.Tensor,
    advantages: torch.Tensor,
    kl: torch.Tensor,
    entropy: torch.Tensor,
    parts: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """(B, 7 + parts) fp32, a row a completion: the `COLUMNS`, entropy summed over its tokens, and the parts.

    Args:
        scores, rewards, advantages, kl: (B,).
        entropy: (B, T).
        parts: (B,) each, what else is to be logged.
    """
    mask = completions.mask
    summed = entropy.masked_fill(~mask, 0).sum(dim=1)
    columns = [scores, rewards, advantages, kl, summed, mask.sum(dim=1), completions.ended, *parts]
    return torch.stack([column.detach().float() for column in columns], dim=1)


def step_figures(table: torch.Tensor, parts: Iterable[str] = ()) -> dict[str, float]:
    """What is logged of an update, from the (N, 7 + parts) of `completion_figures` over all processes.

    Args:
        parts: names of the columns after the `COLUMNS`.

    Returns:
        Means over completions: `score` and its `score_std`, `reward` R, `advantage_std`, `baseline`, `kl` (nats to the
        reference), `length` (tokens), `ended` (share), the parts; means over tokens: `kl_per_token`, `entropy`.
    """
    # MPS has no float64
    columns = dict(zip((*COLUMNS, *parts), table.cpu().double().unbind(dim=1), strict=True))
    means = {name: column.mean().item() for name, column in columns.items()}
    return {
        "score": means["score"],
        "score_std": columns["score"].std(correction=0).item(),
        "reward": means["reward"],
        "baseline": means["reward"] - means["advantage"],
        "advantage_std": columns["advantage"].std(correction=0).item(),
        "kl": means["kl"],
        "kl_per_token": means["kl"] / means["tokens"],
        "entropy": means["entropy"] / means["tokens"],
        "length": means["tokens"],
        "ended": means["ended"],
        **{name: means[name] for name in parts},
    }


def non_finite_places(table: torch.Tensor, places: Sequence[str]) -> list[str]:
    """Those of the B places whose R is not finite, by the table of `completion_figures`."""
    rewards = table[:, COLUMNS.index("reward")]
    return [place for place, fine in zip(places, rewards.isfinite().tolist(), strict=True) if not fine]


def check_figures(figures: dict[str, float], step: int, max_kl: float, places: Sequence[str] = ()) -> None:
    """Stop before an update that starts from a spoiled policy, or would spoil it.

    Args:
        max_kl: nats of the whole completion, on average.
        places: of the prompts whose R is not finite.

    Raises:
        DivergedError: a figure is not finite, or the policy is too far from the reference.
    """
    for name, value in figures.items():
        if not math.isfinite(value):
            raise DivergedError(f"update {step}: {name} is {value}{at_places(places)}; {REMEDY}")
    if figures["kl"] > max_kl:
        kl = f"{figures['kl']:.1f} nats, above --max_kl {max_kl}"
        raise DivergedError(f"update {step}: the mean KL is {kl}; {REMEDY}")
