"""Align the SFT model with the reward model: REINFORCE with a moving-average baseline (arXiv 2402.14740).

In:  prompts of `processed_helpsteer/`, the reward model in `reward_model_output/`, and the SFT model.
Out: `reinforce_output/`: the policy (a plain `from_pretrained` directory), `evaluation.json` (before and after, on
     unseen prompts), `samples.jsonl`, `samples.md`, `metrics.jsonl` (a line an update), `settings.json`, `plots/`,
     `README.md` (model card), `checkpoints/`.

    python train_reinforce.py
    python train_reinforce.py --steps 50 --kl_coefficient 0.1 --baseline ema --output_dir other_output
    python train_reinforce.py --reward_model judge_1 --second_judge judge_2
    accelerate launch train_reinforce.py

A whole completion is one action. With reward model r, policy pi, frozen SFT reference pi_ref and baseline b

    R = r(x, y) - kl_coefficient * sum_t [log pi(y_t) - log pi_ref(y_t)] - missing_eos_penalty * [y did not end]
    loss = -mean((R - b) * sum_t log pi(y_t)), no gradient through R and b

Rewards are in standard deviations of the reward model on its validation split. A stopped run goes on by the same
command; `--fresh` starts over.
"""

import contextlib
import itertools
import json
import math
import pickle
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import scipy.stats
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, set_seed
from datasets import Dataset, DatasetDict
from matplotlib.figure import Figure
from tqdm.auto import tqdm
from transformers import GenerationConfig, HfArgumentParser

from conversations import MIN_MAX_LENGTH, PROMPT_SHARE, Messages, encode_prompt
from evaluate_reward_model import rounded, span
from load_helpsteer_dataset import OUTPUT_DIR as DATA_DIR
from load_helpsteer_dataset import draw, load_processed
from load_smollm_model import (
    MODEL_NAME,
    InputError,
    autocast,
    autocast_dtype,
    check_files,
    decided_by_first,
    first_line,
    keep_freed_memory,
    load_sft_model,
    load_tokenizer,
    pick_device,
    replace_directory,
    resolve_model,
    run_script,
    write_checksums,
    write_text,
)
from reward_model_demo import MODEL_PATH, RewardModelEvaluator, bootstrap_interval, check_templates, rate_interval, wins
from train_reward_model import (
    CHECKPOINT_REMEDY,
    checkpoint_to_resume,
    claim_output,
    data_identity,
    held_output,
    named,
    publish,
    stop_requests,
)

DEVICE = pick_device()
ON_MPS = DEVICE.type == "mps"  # where data and reward model are shorter by default

# ---------------------------------------------------------------------------------------------------------------------
OUTPUT_DIR = "reinforce_output"
# prompts
MAX_PROMPT_LENGTH = 64 if ON_MPS else 128  # tokens, template included; longer prompts are left out
EVALUATION_PROMPTS = 256  # of the validation split
# sampling
MAX_NEW_TOKENS = 48 if ON_MPS else 64  # tokens of a completion
TEMPERATURE = 1.0  # of sampling and of all log-probabilities
# optimisation
STEPS = 50  # updates
COMPLETIONS_PER_STEP = 32  # of all processes together, one for each prompt
MICRO_BATCH_SIZE = 8  # completions per forward and backward pass
LEARNING_RATE = 2e-5  # constant after the warm-up
WARMUP_STEPS = 6  # updates
MAX_GRAD_NORM = 1.0  # gradient clipping
# reward, in standard deviations of the reward model
KL_COEFFICIENT = 0.03  # beta, per nat of the whole completion
MISSING_EOS_PENALTY = 1.0  # for a completion that did not end
BASELINE = "mean"  # of all previous steps; or "ema", or "none"
EMA_DECAY = 0.9  # of the "ema" baseline, per step
MAX_KL = 100.0  # nats of the whole completion; a mean above it stops the run
# rhythm
SAVE_STEPS = 25  # updates
REPORT_TO = "none"  # or a tracker of accelerate: "tensorboard", "wandb", ...
SEED = 42
# ---------------------------------------------------------------------------------------------------------------------

CHECKPOINTS_KEPT = 2
CLOSING = 2  # tokens after an answer in the chat template
EVALUATION_BATCH_SIZE = 32  # prompts answered at once
SHOWN_SAMPLES = 12  # in samples.md

# Settings that do not change the updates: a checkpoint may be continued under others. More steps make a run longer.
IGNORED_ON_RESUME = {
    *("fresh", "data", "output_dir", "report_to", "save_steps", "max_kl", "steps"),
    *("second_judge", "evaluation_prompts"),
}
SIGNIFICANT_DIGITS = 3  # of p-values, which four decimals would round to 0


REMEDY = "the checkpoints before it are kept; start over with a lower --learning_rate or a higher --kl_coefficient"


Found = TypeVar("Found")


class DivergedError(InputError):
    """The policy is spoiled: by the update before the one in which this is found."""


@dataclass
class Settings:
    """Flags over the constants above."""

    model: str = field(default=MODEL_NAME, metadata={"help": "SFT model: hub id or local directory"})
    reward_model: str = field(default=MODEL_PATH, metadata={"help": "directory of the reward model"})
    second_judge: str | None = field(default=None, metadata={"help": "reward model that judges, but does not train"})
    data: str = field(default=DATA_DIR, metadata={"help": "directory written by load_helpsteer_dataset.py"})
    output_dir: str = field(default=OUTPUT_DIR, metadata={"help": "directory for the policy"})
    max_prompt_length: int = field(default=MAX_PROMPT_LENGTH, metadata={"help": "tokens; longer ones are left out"})
    evaluation_prompts: int = field(default=EVALUATION_PROMPTS, metadata={"help": "of the validation split"})
    max_new_tokens: int = field(default=MAX_NEW_TOKENS, metadata={"help": "tokens of a completion"})
    temperature: float = field(default=TEMPERATURE, metadata={"help": "of sampling and of all log-probabilities"})
    steps: int = field(default=STEPS, metadata={"help": "updates"})
    completions_per_step: int = field(default=COMPLETIONS_PER_STEP, metadata={"help": "of all processes together"})
    micro_batch_size: int = field(default=MICRO_BATCH_SIZE, metadata={"help": "completions per pass and device"})
    learning_rate: float = field(default=LEARNING_RATE, metadata={"help": "constant after the warm-up"})
    warmup_steps: int = field(default=WARMUP_STEPS, metadata={"help": "updates"})
    max_grad_norm: float = field(default=MAX_GRAD_NORM, metadata={"help": "gradient clipping"})
    kl_coefficient: float = field(default=KL_COEFFICIENT, metadata={"help": "beta, per nat of a completion"})
    missing_eos_penalty: float = field(default=MISSING_EOS_PENALTY, metadata={"help": "in standard deviations"})
    baseline: Literal["mean", "ema", "none"] = field(default=BASELINE, metadata={"help": "of previous rewards"})
    max_kl: float = field(default=MAX_KL, metadata={"help": "nats; a mean above it stops the run"})
    save_steps: int = field(default=SAVE_STEPS, metadata={"help": "updates between checkpoints"})
    report_to: str = field(default=REPORT_TO, metadata={"help": "a tracker of accelerate"})
    seed: int = field(default=SEED, metadata={"help": "of prompts' order and of sampling"})
    fresh: bool = field(default=False, metadata={"help": "start over instead of resuming"})


# --- the algorithm: pure functions -----------------------------------------------------------------------------------


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


def baseline_value(kind: str, state: dict[str, float], first: float) -> float:
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
    return state["average"] / (1 - EMA_DECAY ** state["steps"])


def updated_baseline(state: dict[str, float], reward: float) -> dict[str, float]:
    """The state with the mean reward of one more step."""
    before = state or {"steps": 0, "total": 0.0, "average": 0.0}
    return {
        "steps": before["steps"] + 1,
        "total": before["total"] + reward,
        "average": EMA_DECAY * before["average"] + (1 - EMA_DECAY) * reward,
    }


# --- prompts and completions -----------------------------------------------------------------------------------------


class Prompt(NamedTuple):
    """A prompt as messages, and as the ids that come before its completion."""

    messages: Messages
    ids: list[int]
    place: str  # the first pair with it, for messages


class Completions(NamedTuple):
    """B sampled completions; P is the longest prompt, T the longest completion."""

    ids: torch.Tensor  # (B, P + T)
    attention_mask: torch.Tensor  # (B, P + T), 0 left of the prompt and after the end of the completion
    mask: torch.Tensor  # (B, T) bool, the completion up to and including its end token
    ended: torch.Tensor  # (B,) bool
    texts: list[str]

    def part(self, start: int, size: int) -> "Completions":
        """Some of the rows, without the columns that are padding in all of them."""
        rows = slice(start, start + size)
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


def unique_prompts(split: Dataset, tokenizer, max_length: int) -> list[Prompt]:
    """The different prompts of a split that have at most `max_length` tokens, in their order.

    Raises:
        InputError: the chat template refuses one.
    """
    first = {}
    for messages, place in zip(split["prompt"], split["place"], strict=True):
        first.setdefault(json.dumps(messages), (messages, place))
    # `encode_prompt` would cut to half of its limit: with this one it shows which prompts are longer.
    limit, prompts = 2 * (max_length + 1), []
    for messages, place in first.values():
        try:
            prompts.append(Prompt(messages, encode_prompt(tokenizer, messages, limit), place))
        except ValueError as error:
            raise InputError(f"{place}: {error}; run load_helpsteer_dataset.py with this --model") from error
    return [prompt for prompt in prompts if len(prompt.ids) <= max_length]


def batches(prompts: Sequence[Prompt], size: int, seed: int) -> Iterator[list[Prompt]]:
    """Endless batches of `size` prompts: every pass in its own order, the same for the same seed."""
    order: list[int] = []
    for epoch in itertools.count():
        order += np.random.default_rng([seed, epoch]).permutation(len(prompts)).tolist()
        while len(order) >= size:
            yield [prompts[index] for index in order[:size]]
            del order[:size]


def end_token_ids(model, tokenizer) -> list[int]:
    """Tokens that end an answer, by the model's generation settings and by its tokenizer."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({each for each in (*configured, tokenizer.eos_token_id) if each is not None})


def sampling_config(settings: Settings, end_ids: list[int], pad_id: int) -> GenerationConfig:
    """Plain sampling from the distribution that is scored: no top-k, top-p or penalties."""
    return GenerationConfig(
        do_sample=True,
        temperature=settings.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=end_ids,
        pad_token_id=pad_id,
    )


def refuse_non_finite(prompts: Sequence[Prompt]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Logits processor that changes nothing; drawing from NaN would end in an obscure error."""

    def refuse(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        finite = logits.isfinite().all(dim=1).tolist()
        if not all(finite):
            places = [prompt.place for prompt, fine in zip(prompts, finite, strict=True) if not fine]
            raise DivergedError(f"the policy's logits are not finite{named(places)}; {REMEDY}")
        return logits

    return refuse


@torch.no_grad()
def sample(
    policy, tokenizer, prompts: Sequence[Prompt], config: GenerationConfig, dtype: torch.dtype | None, seed: int
) -> Completions:
    """One completion for each of B prompts, the same for the same seed."""
    set_seed(seed)
    device, width = policy.device, max(len(prompt.ids) for prompt in prompts)
    padding = [width - len(prompt.ids) for prompt in prompts]
    ids = [[config.pad_token_id] * pad + prompt.ids for pad, prompt in zip(padding, prompts, strict=True)]
    prompt_mask = [[0] * pad + [1] * len(prompt.ids) for pad, prompt in zip(padding, prompts, strict=True)]
    ids, prompt_mask = torch.tensor(ids, device=device), torch.tensor(prompt_mask, device=device)
    # `generate` fills in what `config` leaves open from the model's own generation settings, such as penalties.
    own, policy.generation_config = policy.generation_config, config
    try:
        with autocast(device, dtype):
            ids = policy.generate(
                ids,
                attention_mask=prompt_mask,
                generation_config=config,
                logits_processor=[refuse_non_finite(prompts)],
            )
    finally:
        policy.generation_config = own
    completions = ids[:, width:]
    mask = completion_mask(completions, config.eos_token_id)
    kept = [row[keep].tolist() for row, keep in zip(completions, mask, strict=True)]
    return Completions(
        ids=ids,
        attention_mask=torch.cat([prompt_mask, mask.long()], dim=1),
        mask=mask,
        ended=has_ended(completions, config.eos_token_id),
        texts=tokenizer.batch_decode(kept, skip_special_tokens=True),
    )


# --- one update ------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What stays the same from update to update."""

    settings: Settings
    accelerator: Accelerator
    tokenizer: Any
    policy: Any  # as prepared by accelerate
    reference: Any  # the SFT model; never updated
    evaluator: RewardModelEvaluator
    second: RewardModelEvaluator | None  # judges, but does not train
    optimizer: Any
    sampling: GenerationConfig
    dtype: torch.dtype | None  # of autocast
    prompts: list[Prompt]  # to train on
    unseen: list[Prompt]  # to evaluate on


def step_seed(seed: int, step: int, part: int) -> int:
    """Seed of the random numbers of a step (0: the evaluation) in a process, or of a batch of the evaluation.

    They follow from these numbers alone, so a resumed run draws what an undisturbed one would have drawn.
    """
    return int(np.random.SeedSequence([seed, step, part]).generate_state(1)[0])


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up, then constant; `step` counts from 1."""
    return settings.learning_rate * min(1.0, step / max(settings.warmup_steps, 1))


def part_distributions(run: Run, model, part: Completions) -> torch.Tensor:
    """`distributions` of a model of the run at sampled completions."""
    with autocast(part.ids.device, run.dtype):
        return distributions(model, part.ids, part.attention_mask, part.mask.shape[1], run.settings.temperature)


def accumulate_gradient(
    run: Run, completions: Completions, scores: torch.Tensor, baseline: float
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Add the REINFORCE gradient of B completions to the policy's, in micro-batches.

    Args:
        scores: (B,) fp32 rewards by the reward model.
        baseline: b, the same for all.

    Returns:
        Scalar fp32 sums over the completions of this process, and (B,) the R of each.
    """
    settings, accelerator = run.settings, run.accelerator
    size, count = settings.micro_batch_size, len(scores)
    sums: dict[str, torch.Tensor] = {}
    all_rewards = []
    for start in range(0, count, size):
        part, part_scores = completions.part(start, size), scores[start : start + size]
        last = start + size >= count
        with contextlib.nullcontext() if last else accelerator.no_sync(run.policy):
            all_log_probs = part_distributions(run, run.policy, part)
            log_probs = of_tokens(all_log_probs, part.ids)
            with torch.no_grad():
                reference_log_probs = of_tokens(part_distributions(run, run.reference, part), part.ids)
                entropy = entropies(all_log_probs)
            kl = sequence_kl(log_probs.detach(), reference_log_probs, part.mask)
            rewards = regularised_rewards(
                part_scores, kl, part.ended, settings.kl_coefficient, settings.missing_eos_penalty
            )
            # Shares of the mean over all completions, so that micro-batches add up to one batch.
            loss = reinforce_loss(log_probs, part.mask, rewards - baseline) * len(part_scores) / count
            accelerator.backward(loss)
        values = {
            "completions": torch.ones_like(part_scores),
            "score": part_scores,
            "score_squared": part_scores.square(),
            "reward": rewards,
            "reward_squared": rewards.square(),
            "kl": kl,
            "entropy": entropy.masked_fill(~part.mask, 0).sum(dim=1),
            "tokens": part.mask.sum(dim=1),
            "ended": part.ended,
        }
        sums = {name: sums.get(name, 0) + value.float().sum() for name, value in values.items()}
        all_rewards.append(rewards)
    return sums, torch.cat(all_rewards)


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


def found_by_all(act: Callable[[], Found]) -> Found:
    """What `act` returns in this process.

    Raises:
        DivergedError: `act` raised one in any process; all raise it, so that none waits for another.
    """
    found, problem = None, []
    try:
        found = act()
    except DivergedError as error:
        problem = [str(error)]
    if problems := gather_object(problem):
        raise DivergedError(problems[0])
    return found


def take_step(run: Run, step: int, prompts: Sequence[Prompt], baseline_state: dict[str, float]) -> dict[str, Any]:
    """Sample, score and update the policy once; `prompts` are this process's.

    Returns:
        The figures of `step_figures`, and the gradient norm before clipping, the learning rate, and one sample.
    """
    settings, accelerator = run.settings, run.accelerator
    started = time.perf_counter()
    prompts = sorted(prompts, key=lambda prompt: len(prompt.ids))  # micro-batches of similar lengths
    policy = accelerator.unwrap_model(run.policy)
    seed = step_seed(settings.seed, step, accelerator.process_index)
    completions = found_by_all(lambda: sample(policy, run.tokenizer, prompts, run.sampling, run.dtype, seed))
    scores = run.evaluator.get_reward_scores([prompt.messages for prompt in prompts], completions.texts)
    scores = torch.tensor(scores, dtype=torch.float32, device=accelerator.device)
    # Nothing was seen before the first step, and its KL is 0: its own mean reward is the baseline.
    first = regularised_rewards(scores, torch.zeros_like(scores), completions.ended, 0.0, settings.missing_eos_penalty)
    first = float(accelerator.reduce(first.mean(), "mean"))
    baseline = baseline_value(settings.baseline, baseline_state, first)

    sums, rewards = accumulate_gradient(run, completions, scores, baseline)
    totals = accelerator.reduce(torch.stack(list(sums.values())), "sum").tolist()
    figures = step_figures(dict(zip(sums, totals, strict=True)), baseline)
    figures["gradient_norm"] = float(accelerator.clip_grad_norm_(run.policy.parameters(), settings.max_grad_norm))
    spoiled = [prompt.place for prompt, fine in zip(prompts, rewards.isfinite().tolist(), strict=True) if not fine]
    check_figures(figures, step, settings.max_kl, gather_object(spoiled))
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(settings, step)
    run.optimizer.step()
    run.optimizer.zero_grad()

    seconds = time.perf_counter() - started
    shown = step % len(prompts)
    return {
        "step": step,
        **figures,
        "learning_rate": learning_rate(settings, step),
        "seconds": seconds,
        "tokens_per_second": figures["length"] * settings.completions_per_step / seconds,
        "sample": {
            "prompt": prompts[shown].messages[-1]["content"],
            "completion": completions.texts[shown],
            "score": float(scores[shown]),
        },
    }


# --- checkpoints -----------------------------------------------------------------------------------------------------


def save_checkpoint(run: Run, directory: Path, state: dict[str, Any]) -> None:
    """Policy, optimiser and baseline after a step in `checkpoint-N`; the latest ones are kept.

    Random numbers need no saving; see `step_seed`.
    """
    with replace_directory(directory / f"checkpoint-{state['step']}", marker="trainer_state.json") as target:
        run.accelerator.unwrap_model(run.policy).save_pretrained(target)
        torch.save(run.optimizer.state_dict(), target / "optimizer.pt")
        write_text(target / "trainer_state.json", json.dumps(state, indent=2) + "\n")
        write_checksums(target)
    saved = sorted(directory.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for old in saved[:-CHECKPOINTS_KEPT]:
        shutil.rmtree(old)


def load_policy(run: Run, directory: str | Path) -> None:
    """Let the policy go on with the weights in a directory."""
    run.accelerator.unwrap_model(run.policy).load_state_dict(load_sft_model(str(directory)).state_dict())


def load_checkpoint(run: Run, checkpoint: str | None) -> dict[str, Any]:
    """Continue with the policy and the optimiser of a checkpoint; without one nothing changes.

    Returns:
        The number of the last update, and the state of the baseline after it.

    Raises:
        InputError: the checkpoint is damaged.
    """
    if not checkpoint:
        return {"step": 0, "baseline": {}}
    path = Path(checkpoint)
    decided_by_first(lambda: check_files(path, CHECKPOINT_REMEDY))
    load_policy(run, path)
    try:
        run.optimizer.load_state_dict(torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu"))
        return json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}/optimizer.pt: damaged ({first_line(error)}); {CHECKPOINT_REMEDY}") from error


def read_log(path: Path, steps: int) -> list[dict[str, Any]]:
    """The first so many lines of the log; later ones belong to updates that no checkpoint has.

    Raises:
        InputError: they are not all there.
    """
    if not steps:
        return []
    try:
        with path.open(encoding="utf-8") as file:
            log = [json.loads(line) for line in itertools.islice(file, steps)]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged ({first_line(error)}); --fresh starts over") from error
    if len(log) < steps:
        raise InputError(f"{path}: has {len(log)} updates, but the checkpoint has {steps}; --fresh starts over")
    return log


# --- before and after ------------------------------------------------------------------------------------------------


def distinct(texts: Sequence[str], n: int = 3) -> float:
    """Share of different ones among all word n-grams of the texts (arXiv 1510.03055)."""
    grams = [gram for text in texts for gram in n_grams(text, n)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(texts: Sequence[str], n: int = 3) -> float:
    """Mean share of a text's word n-grams that occurred in it before."""
    shares = [1 - len(set(grams)) / len(grams) for grams in (n_grams(text, n) for text in texts) if grams]
    return float(np.mean(shares)) if shares else 0.0


def cut_to_equal_words(texts: Sequence[str], others: Sequence[str]) -> tuple[list[str], list[str]]:
    """Each text and its partner with as many words as the shorter of both has: more n-grams repeat more."""
    pairs = [(text.split(), other.split()) for text, other in zip(texts, others, strict=True)]
    sizes = [min(map(len, pair)) for pair in pairs]
    first, second = zip(*pairs, strict=True)
    return tuple([" ".join(words[:size]) for words, size in zip(side, sizes, strict=True)] for side in (first, second))


def n_grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


class Answers(NamedTuple):
    """What one policy answered to N evaluation prompts."""

    texts: list[str]
    lengths: np.ndarray  # (N,) tokens, end token included
    ended: np.ndarray  # (N,) bool
    kl: np.ndarray  # (N,) nats to the reference


def answer(run: Run, policy, title: str) -> Answers:
    """One sampled answer to each unseen prompt, with the same random numbers for every policy.

    The batches are spread over the processes; all of them get all answers.
    """
    rows = gather_object(found_by_all(lambda: own_answers(run, policy, title)))
    _, texts, lengths, ended, kl = zip(*sorted(rows), strict=True)
    return Answers(list(texts), np.array(lengths), np.array(ended), np.array(kl))


@torch.no_grad()
def own_answers(run: Run, policy, title: str) -> list[tuple[int, str, int, bool, float]]:
    """This process's share of `answer`: place of the prompt, text, tokens, whether it ended, KL in nats."""
    accelerator, rows = run.accelerator, []
    starts = range(0, len(run.unseen), EVALUATION_BATCH_SIZE)[accelerator.process_index :: accelerator.num_processes]
    for start in tqdm(starts, desc=title, unit=" batches", disable=not accelerator.is_main_process):
        prompts = run.unseen[start : start + EVALUATION_BATCH_SIZE]
        seed = step_seed(run.settings.seed, 0, start)
        sampled = sample(policy, run.tokenizer, prompts, run.sampling, run.dtype, seed)
        kl = []
        for place in range(0, len(prompts), run.settings.micro_batch_size):
            part = sampled.part(place, run.settings.micro_batch_size)
            both = [of_tokens(part_distributions(run, each, part), part.ids) for each in (policy, run.reference)]
            kl += sequence_kl(*both, part.mask).tolist()
        columns = (sampled.texts, sampled.mask.sum(dim=1).tolist(), sampled.ended.tolist(), kl)
        rows += [(start + place, *row) for place, row in enumerate(zip(*columns, strict=True))]
    return rows


def wilcoxon_p(differences: np.ndarray) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test; zeros count half for each side."""
    if not differences.any():
        return 1.0
    return float(scipy.stats.wilcoxon(differences, zero_method="zsplit").pvalue)


def judge(
    evaluator: RewardModelEvaluator, prompts: Sequence[Prompt], before: Answers, after: Answers
) -> dict[str, Any]:
    """Rewards of both sides by one judge and the paired comparison of them; see `evaluation`."""
    messages = [prompt.messages for prompt in prompts]
    scores = evaluator.get_reward_scores([*messages, *messages], [*before.texts, *after.texts], progress=True)
    old, new = np.array(scores).reshape(2, len(prompts))
    won = wins(new, old)
    return {
        "rewards_before": old,
        "rewards_after": new,
        "reward_before": float(old.mean()),
        "reward_after": float(new.mean()),
        "reward_gain": float((new - old).mean()),
        "reward_gain_interval": bootstrap_interval(new - old),
        "wilcoxon_p": wilcoxon_p(new - old),
        "win_rate": float(won.mean()),
        "win_rate_interval": rate_interval(won),
    }


def evaluation(before: Answers, after: Answers, first: dict[str, Any], second: dict[str, Any] | None) -> dict[str, Any]:
    """Content of `evaluation.json`.

    Returns:
        By the training judge: `n`, `reward_before`, `reward_after`, `reward_gain` and its paired bootstrap 95 %
        interval, `wilcoxon_p`, `win_rate` against SFT (ties half) and its interval; the same with `second_judge_`
        in front by the second judge, None without one. Of the texts: mean lengths in tokens and `length_ratio`;
        `distinct3` before and after, of each pair of answers cut to equal length, and `distinct3_ratio`;
        `repetition` and `ended` before and after; mean `kl` of the policy's answers to the reference in nats.
    """
    kept = ("reward_before", "reward_after", "reward_gain", "reward_gain_interval", "wilcoxon_p", "win_rate")
    kept = (*kept, "win_rate_interval")
    texts: dict[str, float] = {}
    equal = cut_to_equal_words(before.texts, after.texts)
    for when, each, cut in (("before", before, equal[0]), ("after", after, equal[1])):
        texts |= {
            f"length_{when}": float(each.lengths.mean()),
            f"distinct3_{when}": distinct(cut),
            f"repetition_{when}": repetition(each.texts),
            f"ended_{when}": float(each.ended.mean()),
        }
    return {
        "n": len(before.texts),
        **{name: first[name] for name in kept},
        **{f"second_judge_{name}": second[name] if second else None for name in kept},
        **texts,
        "length_ratio": texts["length_after"] / texts["length_before"],
        "distinct3_ratio": texts["distinct3_after"] / texts["distinct3_before"],
        "kl": float(after.kl.mean()),
    }


def readable(results: dict[str, Any]) -> dict[str, Any]:
    """The results with four decimals, p-values with three significant digits."""
    p_values = {name: value for name, value in results.items() if name.endswith("wilcoxon_p") and value is not None}
    return rounded(results) | {name: float(f"{value:.{SIGNIFICANT_DIGITS}g}") for name, value in p_values.items()}


def samples(prompts: Sequence[Prompt], before: Answers, after: Answers, first: dict, second: dict | None) -> list[dict]:
    """A row for each evaluation prompt, with both answers and their rewards."""
    rows = []
    for number, prompt in enumerate(prompts):
        row = {"prompt": prompt.messages, "before": before.texts[number], "after": after.texts[number]}
        for name, result in (("reward", first), ("second_judge", second)):
            if result:
                row |= {f"{name}_{when}": float(result[f"rewards_{when}"][number]) for when in ("before", "after")}
        rows.append(row)
    return rows


def json_lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def samples_table(rows: Sequence[dict[str, Any]]) -> str:
    """Some of the answers before and after, in Markdown: evenly spread over the gain in reward."""
    ranked = sorted(rows, key=lambda row: row["reward_after"] - row["reward_before"])
    shown = [ranked[place] for place in np.linspace(0, len(ranked) - 1, min(SHOWN_SAMPLES, len(ranked))).astype(int)]
    lines = ["| prompt | before | after | reward |", "|---|---|---|---|"]
    for row in shown:
        cells = [row["prompt"][-1]["content"], row["before"], row["after"]]
        cells = [" ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in cells]
        lines.append(f"| {' | '.join(cells)} | {row['reward_before']:+.2f} → {row['reward_after']:+.2f} |")
    return "\n".join(lines) + "\n"


# --- plots and card --------------------------------------------------------------------------------------------------


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


def model_card(results: dict[str, Any], settings: dict[str, Any], log: Sequence[dict[str, float]]) -> str:
    """README.md of the policy."""

    def row(name: str, prefix: str) -> str:
        if results[f"{prefix}win_rate"] is None:
            return f"| {name} | – | – | – |"
        return (
            f"| {name} | {results[f'{prefix}reward_before']:+.3f} → {results[f'{prefix}reward_after']:+.3f} | "
            f"{results[f'{prefix}reward_gain']:+.3f} ({span(results[f'{prefix}reward_gain_interval'])}, "
            f"p = {results[f'{prefix}wilcoxon_p']:.2g}) | "
            f"{results[f'{prefix}win_rate']:.3f} ({span(results[f'{prefix}win_rate_interval'])}) |"
        )

    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [reinforce, rlhf]
---
# Policy aligned by REINFORCE

Sampled answers to {results["n"]:,} prompts that the training did not see, before (SFT) and after, with the same random
numbers. Intervals are 95 %.

| judge | mean reward | gain | win rate against SFT |
|---|---|---|---|
{row("the reward model of the training", "")}
{row("second reward model", "second_judge_")}

| | before | after |
|---|---|---|
| length (tokens) | {results["length_before"]:.1f} | {results["length_after"]:.1f} |
| distinct 3-grams | {results["distinct3_before"]:.3f} | {results["distinct3_after"]:.3f} |
| repetition of 3-grams | {results["repetition_before"]:.3f} | {results["repetition_after"]:.3f} |
| share that ended | {results["ended_before"]:.3f} | {results["ended_after"]:.3f} |
| KL to SFT (nats per answer) | 0 | {results["kl"]:.2f} |

![training](plots/training.png)
![before and after](plots/before_and_after.png)

## Origin
- SFT model: {settings["base_model"]}; reward model: {settings["reward_model"]}; prompts: {settings["source"]}
- {len(log):,} updates of {settings["completions_per_step"]} completions of at most {settings["max_new_tokens"]} tokens,
  temperature {settings["temperature"]}, learning rate {settings["learning_rate"]}, KL coefficient
  {settings["kl_coefficient"]}, baseline "{settings["baseline"]}", seed {settings["seed"]}; the others are in
  `settings.json`

Rewards are in standard deviations of the reward model on its validation split. A higher reward is not the same as a
better answer: read `samples.md`.
"""


# --- the stages, in order --------------------------------------------------------------------------------------------


def parse_settings(arguments: list[str] | None = None) -> Settings:
    """Flags over constants; an unknown flag or a bad value ends with a usage line."""
    parser = HfArgumentParser(Settings, description=__doc__.splitlines()[0])
    settings, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    positive = ("steps", "completions_per_step", "micro_batch_size", "max_new_tokens", "temperature", "save_steps")
    for name in (*positive, "learning_rate", "evaluation_prompts", "max_grad_norm", "max_kl"):
        if not 0 < getattr(settings, name) < math.inf:
            parser.error(f"--{name} must be above 0")
    if settings.max_prompt_length < MIN_MAX_LENGTH // 2:
        parser.error(f"--max_prompt_length must be at least {MIN_MAX_LENGTH // 2}")
    for name in ("kl_coefficient", "missing_eos_penalty", "warmup_steps", "seed"):
        if not 0 <= getattr(settings, name) < math.inf:
            parser.error(f"--{name} must not be negative")
    return settings


def read_prompts(splits, tokenizer, settings: Settings) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on, from the training split, and to evaluate on, from the validation split.

    Raises:
        InputError: too few are short enough.
    """
    found = {name: unique_prompts(splits[name], tokenizer, settings.max_prompt_length) for name in splits}
    if len(found["train"]) < settings.completions_per_step or not found["validation"]:
        raise InputError(
            f"{settings.data}: {len(found['train'])} training and {len(found['validation'])} validation prompts have "
            f"at most {settings.max_prompt_length} tokens, {settings.completions_per_step} and 1 are needed; raise "
            "--max_prompt_length or lower --completions_per_step"
        )
    drawn = draw(len(found["validation"]), settings.evaluation_prompts, settings.seed)
    return found["train"], [found["validation"][index] for index in drawn]


def run_settings(settings: Settings, metadata: dict[str, Any], origin: str, processes: int) -> dict[str, Any]:
    """All resolved settings, with what identifies SFT model, reward model and prompts."""
    try:
        config = json.loads((Path(settings.reward_model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{settings.reward_model}: no trained reward model here; run train_reward_model.py") from error
    return {
        **asdict(settings),
        "base_model": origin,
        "source": metadata["source"],
        "data_identity": data_identity(metadata),
        "reward_identity": {name: config.get(name) for name in ("reward_mean", "reward_std", "reward_max_length")},
        "processes": processes,
    }


def build_accelerator(settings: Settings) -> Accelerator:
    """Devices and processes; mixed precision is this script's own, the same for policy and reference.

    Raises:
        InputError: the tracker is unknown or not installed, or the processes can not share the work.
    """
    tracker = None if settings.report_to == "none" else settings.report_to
    try:
        accelerator = Accelerator(
            cpu=DEVICE.type == "cpu", mixed_precision="no", log_with=tracker, project_dir=settings.output_dir
        )
    except ValueError as error:
        raise InputError(f"--report_to {tracker}: {first_line(error)}") from error
    if tracker and not accelerator.log_with:
        raise InputError(f"--report_to {tracker}: not installed; pip install {tracker}")
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise InputError(f"{accelerator.distributed_type.value}: completions are sampled from whole models; use DDP")
    if settings.completions_per_step % accelerator.num_processes:
        raise InputError(
            f"--completions_per_step {settings.completions_per_step} can not be divided among "
            f"{accelerator.num_processes} processes"
        )
    return accelerator


def load_judge(settings: Settings, flag: str, device: torch.device) -> RewardModelEvaluator:
    """The reward model that a flag names, with rewards in standard deviations.

    Raises:
        InputError: it can not be loaded, or would not read whole prompts and completions.
    """
    path = getattr(settings, flag)
    evaluator = RewardModelEvaluator(path, device=str(device), mixed_precision=True, normalize=True)
    reads, prompt = evaluator.max_length, int(evaluator.max_length * PROMPT_SHARE)
    if settings.max_prompt_length > prompt or settings.max_prompt_length + settings.max_new_tokens + CLOSING > reads:
        raise InputError(
            f"--{flag} {path}: reads {reads} tokens, of the prompt {prompt}; lower --max_prompt_length and "
            "--max_new_tokens, or train it on data with a larger --max_length"
        )
    return evaluator


def build_run(settings: Settings, accelerator: Accelerator, splits: DatasetDict, sft: str) -> Run:
    """Load prompts and models; the policy begins as the SFT model in the directory `sft`.

    Raises:
        InputError: something can not be loaded, or prompts and completions do not fit into a model.
    """
    if DEVICE.type == "cpu":
        keep_freed_memory()
    tokenizer = load_tokenizer(sft)
    prompts, unseen = read_prompts(splits, tokenizer, settings)
    evaluator = load_judge(settings, "reward_model", accelerator.device)
    second = load_judge(settings, "second_judge", accelerator.device) if settings.second_judge else None
    for each, scored in ((evaluator, [*prompts, *unseen]), (second, unseen)):
        if each:
            check_templates(each, [prompt.messages for prompt in scored], [prompt.place for prompt in scored])
    reference = load_sft_model(sft).to(accelerator.device)
    room = getattr(reference.config, "max_position_embeddings", math.inf)
    if settings.max_prompt_length + settings.max_new_tokens > room:
        raise InputError(f"--max_prompt_length and --max_new_tokens are more than the {room} tokens that {sft} takes")
    policy = load_sft_model(sft)  # in evaluation mode: no dropout anywhere
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    end_ids = end_token_ids(reference, tokenizer)
    return Run(
        settings=settings,
        accelerator=accelerator,
        tokenizer=tokenizer,
        policy=policy,
        reference=reference,
        evaluator=evaluator,
        second=second,
        optimizer=optimizer,
        sampling=sampling_config(settings, end_ids, tokenizer.pad_token_id),
        dtype=torch.bfloat16 if autocast_dtype(accelerator.device) is torch.bfloat16 else None,
        prompts=prompts,
        unseen=unseen,
    )


@contextlib.contextmanager
def without_spoiled(accelerator: Accelerator, checkpoint: Path):
    """Remove a checkpoint when the block finds its policy spoiled, so that no run goes on from there."""
    try:
        yield
    except DivergedError:
        if accelerator.is_main_process:
            shutil.rmtree(checkpoint, ignore_errors=True)
        raise


def train(run: Run, output: Path, state: dict[str, Any]) -> list[dict[str, Any]]:
    """All updates after those in `state`; returns the log of the whole run.

    Ends the process with exit code 130 when it was interrupted.
    """
    settings, accelerator, checkpoints = run.settings, run.accelerator, output / "checkpoints"
    process, processes, first = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    log = read_log(checkpoints / "metrics.jsonl", state["step"])
    accelerator.wait_for_everyone()  # all have read it
    if first:
        write_text(checkpoints / "metrics.jsonl", json_lines(log))
        for leftover in checkpoints.glob(".checkpoint-*"):  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        if state["step"] < settings.steps:  # the run may have been finished with fewer
            (checkpoints / "finished").unlink(missing_ok=True)
    drawn = batches(run.prompts, settings.completions_per_step, settings.seed)
    steps = range(state["step"] + 1, settings.steps + 1)
    bar = tqdm(initial=state["step"], total=settings.steps, desc="REINFORCE", unit=" updates", disable=not first)
    with stop_requests() as stop_requested, bar:
        for step, prompts in zip(steps, itertools.islice(drawn, state["step"], None), strict=False):
            with without_spoiled(accelerator, checkpoints / f"checkpoint-{step - 1}"):
                entry = take_step(run, step, prompts[process::processes], state["baseline"])
            state = {"step": step, "baseline": updated_baseline(state["baseline"], entry["reward"])}
            log.append(entry)
            stop = stop_requested()
            if first:
                with (checkpoints / "metrics.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json_lines([entry]))
                if stop or step % settings.save_steps == 0 or step == settings.steps:
                    save_checkpoint(run, checkpoints, state)
            accelerator.wait_for_everyone()
            accelerator.log({name: value for name, value in entry.items() if name != "sample"}, step=step)
            bar.set_postfix(
                score=f"{entry['score']:+.2f}", kl=f"{entry['kl']:.2f}", tokens_s=f"{entry['tokens_per_second']:.0f}"
            )
            bar.update()
            if stop:
                if first:
                    print(
                        f"Stopped at update {step} of {settings.steps}, checkpoint saved. "
                        "The same command goes on; --fresh starts over."
                    )
                sys.exit(130)
    return log


def finish(run: Run, log: list[dict[str, Any]], settings: dict[str, Any], output: Path) -> dict[str, Any] | None:
    """Evaluate before and after, save and publish; the first process returns the results.

    Raises:
        DivergedError: the last update spoiled the policy.
    """
    policy = run.accelerator.unwrap_model(run.policy)
    before = answer(run, run.reference, "Answers before")
    with without_spoiled(run.accelerator, output / "checkpoints" / f"checkpoint-{len(log)}"):
        after = answer(run, policy, "Answers after")
        check_figures({"kl": float(after.kl.mean())}, len(log), run.settings.max_kl)
    if not run.accelerator.is_main_process:
        return None
    first = judge(run.evaluator, run.unseen, before, after)
    second = judge(run.second, run.unseen, before, after) if run.second else None
    results = evaluation(before, after, first, second)
    rows = samples(run.unseen, before, after, first, second)
    with replace_directory(output / ".new", marker="config.json") as staging:
        policy.save_pretrained(staging)
        run.tokenizer.save_pretrained(staging)
        (staging / "plots").mkdir()
        plot_steps(log, staging / "plots" / "training.png")
        plot_before_and_after(before, after, first, staging / "plots" / "before_and_after.png")
        write_text(staging / "evaluation.json", json.dumps(readable(results), indent=2) + "\n")
        write_text(staging / "settings.json", json.dumps(settings, indent=2) + "\n")
        write_text(staging / "samples.jsonl", json_lines(rows))
        write_text(staging / "metrics.jsonl", json_lines(log))
        write_text(staging / "samples.md", samples_table(rows))
        write_text(staging / "README.md", model_card(results, settings, log))
        write_checksums(staging)
    publish(output / ".new", output)
    (output / ".new").rmdir()
    return results


def report(results: dict[str, Any], output: Path) -> str:
    """The result in some lines."""
    lines = [f"{results['n']} unseen prompts, before -> after, 95 % intervals"]
    for name, prefix in (("reward", ""), ("second judge", "second_judge_")):
        if results[f"{prefix}win_rate"] is not None:
            lines.append(
                f"{name:13} {results[f'{prefix}reward_before']:+.3f} -> {results[f'{prefix}reward_after']:+.3f}, gain "
                f"{results[f'{prefix}reward_gain']:+.3f} ({span(results[f'{prefix}reward_gain_interval'])}), win rate "
                f"{results[f'{prefix}win_rate']:.3f} ({span(results[f'{prefix}win_rate_interval'])})"
            )
    lines.append(
        f"length x {results['length_ratio']:.2f}, distinct 3-grams x {results['distinct3_ratio']:.2f}, ended "
        f"{results['ended_before']:.2f} -> {results['ended_after']:.2f}, KL {results['kl']:.2f} nats"
    )
    return "\n".join([*lines, f"written to {output}/"])


def open_run(
    settings: Settings, accelerator: Accelerator, splits: DatasetDict, metadata: dict[str, Any], output: Path
) -> tuple[Run, dict[str, Any], dict[str, Any]]:
    """A new run, or the unfinished one with these settings; its state after the last checkpoint; all its settings.

    Nothing of an earlier run is touched before everything was found and loaded.
    """
    source = resolve_model(settings.model)
    resolved = run_settings(settings, metadata, source.origin, accelerator.num_processes)
    run = build_run(settings, accelerator, splits, source.path)
    checkpoint = checkpoint_to_resume(output / "checkpoints", resolved, IGNORED_ON_RESUME, settings.fresh)
    if settings.report_to != "none":
        accelerator.init_trackers("reinforce", config=asdict(settings))
    if checkpoint:
        accelerator.print(f"Resuming from {checkpoint} (--fresh starts over).")
    state = load_checkpoint(run, checkpoint)
    if state["step"] > settings.steps:
        raise InputError(
            f"{checkpoint}: has more updates than --steps {settings.steps}; give more, or start over with --fresh"
        )
    return run, state, resolved


def main() -> None:
    settings = parse_settings()
    output = Path(settings.output_dir)
    claim_output(output, [*filter(None, (settings.model, settings.reward_model, settings.second_judge))], rewards=False)
    accelerator = build_accelerator(settings)
    splits, metadata = load_processed(settings.data)
    with held_output(output):
        run, state, resolved = open_run(settings, accelerator, splits, metadata, output)
        log = train(run, output, state)
        results = finish(run, log, resolved, output)
        if results:
            (output / "checkpoints" / "finished").touch()
            print(report(results, output))
        for tracker in accelerator.trackers:
            tracker.finish()


if __name__ == "__main__":
    run_script(main)
