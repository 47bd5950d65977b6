"""Prompts and sampled completions."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import GenerationConfig

from reward_pipeline.constraints import constrain
from reward_pipeline.conversations import Messages, encode_prompt
from reward_pipeline.files import InputError
from reward_pipeline.models import positions
from reward_pipeline.pairs import draw
from reward_pipeline.processes import together
from reward_pipeline.reinforce import Completions, log_probabilities, random_seeds, sequence_kl, token_distributions
from reward_pipeline.sampling import PolicyPrompt, sample


class Answers(NamedTuple):
    """What one policy answered to N evaluation prompts."""

    texts: list[str]
    lengths: np.ndarray  # (N,) tokens, end token included
    ended: np.ndarray  # (N,) bool
    kl: np.ndarray  # (N,) nats to the reference


def unique_prompts(split: Dataset, tokenizer: Any, max_length: int) -> list[PolicyPrompt]:
    """The different prompts of a split that have at most `max_length` tokens, in their order.

    Longer ones are left out, not cut: the policy would be asked another question than people were.

    Raises:
        InputError: the chat template refuses one.
    """
    first: dict[str, tuple[Messages, str]] = {}
    for messages, place in zip(split["prompt"], split["place"], strict=True):
        first.setdefault(json.dumps(messages), (messages, place))
    prompts = []
    for messages, place in first.values():
        try:
            prompts.append(PolicyPrompt(messages, encode_prompt(tokenizer, messages), place))
        except ValueError as error:
            raise InputError(f"{place}: {error}; run load_helpsteer_dataset.py with this --model") from error
    return [prompt for prompt in prompts if len(prompt.ids) <= max_length]


def read_prompts(
    splits: Mapping[str, Dataset],
    tokenizer: Any,
    name: str,
    max_length: int,
    batch_size: int,
    evaluated: int,
    seed: int,
) -> tuple[list[PolicyPrompt], list[PolicyPrompt]]:
    """Prompts to train on, from the training split, and to evaluate on, from the validation split.

    Args:
        name: of the processed data, for messages.
        max_length: in tokens, template included.
        batch_size: prompts of an update; at least so many are needed.
        evaluated: prompts to evaluate on, drawn by `seed`; all where there are fewer.

    Raises:
        InputError: too few are short enough.
    """
    train, validation = (unique_prompts(splits[split], tokenizer, max_length) for split in ("train", "validation"))
    if len(train) < batch_size or not validation:
        raise InputError(
            f"{name}: {len(train)} training and {len(validation)} validation prompts have at most {max_length} tokens, "
            f"{batch_size} and 1 are needed; raise --max_prompt_length or lower --completions_per_step"
        )
    return train, [validation[index] for index in draw(len(validation), evaluated, seed)]


def constrained(
    prompts: Sequence[PolicyPrompt], tokenizer: Any, max_length: int, seed: int, share: float, held_out: bool
) -> list[PolicyPrompt]:
    """The prompts, a share of them with a constraint joined to it that a rule checks, where that leaves room.

    Args:
        max_length: in tokens, template included; a prompt that would be longer stays as it is.
        seed: of which ones, and of their constraints.
        held_out: in wordings that no training sees.
    """
    chosen, made = draw(len(prompts), round(share * len(prompts)), seed), [*prompts]
    for number, index in enumerate(chosen):
        messages, constraint = constrain(prompts[index].messages, number, seed, held_out)
        ids = encode_prompt(tokenizer, messages)
        if len(ids) <= max_length:
            made[index] = PolicyPrompt(messages, ids, prompts[index].place, constraint)
    return made


def batches(prompts: Sequence[PolicyPrompt], size: int, seed: int) -> Iterator[list[PolicyPrompt]]:
    """Endless batches of `size` prompts: every pass in its own order, the same for the same seed."""
    order: list[int] = []
    for epoch in itertools.count():
        order += np.random.default_rng([seed, epoch]).permutation(len(prompts)).tolist()
        while len(order) >= size:
            yield [prompts[index] for index in order[:size]]
            del order[:size]


def check_room(model: Any, name: str, length: int) -> None:
    """Make sure that a model takes prompts and completions of so many tokens together.

    Raises:
        InputError: it was not made for so many.
    """
    room = positions(model)
    if length > room:
        raise InputError(f"--max_prompt_length and --max_new_tokens are more than the {room} tokens that {name} takes")


def sample_row(
    prompts: Sequence[PolicyPrompt], completions: Completions, scores: torch.Tensor, number: int
) -> dict[str, Any]:
    """One of the completions of an update, for people to read in the log."""
    return {
        "prompt": prompts[number].messages[-1]["content"],
        "completion": completions.texts[number],
        "score": float(scores[number]),
    }


def answers_of(
    accelerator: Accelerator,
    tokenizer: Any,
    policy: Any,
    *,
    reference: Any | None,
    prompts: Sequence[PolicyPrompt],
    config: GenerationConfig,
    dtype: torch.dtype | None,
    seed: int,
    batch_size: int,
    micro_batch_size: int,
    title: str,
) -> Answers:
    """One sampled answer to each of N prompts, with the same random numbers for every policy.

    The batches are spread over the processes, which all have to call this; all of them get all answers.

    Args:
        policy, tokenizer, config, dtype: as for `sample`.
        reference: what the KL is measured to; for None it is left at 0.
        batch_size: prompts answered at once.
        micro_batch_size: completions whose log-probabilities are taken at once.
        title: of the progress bar.

    Raises:
        DivergedError: the policy's logits are not finite.
    """
    first, stride = accelerator.process_index, accelerator.num_processes
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number].ids))  # little is padded then
    seeds = random_seeds(len(prompts), seed, 0, 0)
    batches = [by_length[start : start + batch_size] for start in range(0, len(prompts), batch_size)]

    @torch.no_grad()
    def own_share() -> list[tuple[int, str, int, bool, float]]:
        """Place of the prompt, text, tokens, whether it ended, and KL of each answer of this process."""
        rows: list[tuple[int, str, int, bool, float]] = []
        own = range(len(batches))[first::stride]
        for number in tqdm(own, desc=title, unit=" batches", disable=not accelerator.is_main_process):
            asked = [prompts[place] for place in batches[number]]
            sampled = sample(policy, tokenizer, asked, config, dtype, [seeds[place] for place in batches[number]])
            kl = [0.0] * len(asked)
            for start in range(0, len(asked) if reference else 0, micro_batch_size):
                part = sampled.part(start, micro_batch_size)
                # Not the log-probabilities of the sampling: in bf16 those of a token alone and of a whole completion
                # differ in the third digit, which would look like a KL.
                log_probs, others = (
                    log_probabilities(token_distributions(model, part, config.temperature, dtype), part)
                    for model in (policy, reference)
                )
                kl[start : start + micro_batch_size] = sequence_kl(log_probs, others, part.mask).tolist()
            columns = sampled.texts, sampled.mask.sum(dim=1).tolist(), sampled.ended.tolist(), kl
            rows += zip(batches[number], *columns, strict=True)
        return rows

    rows = sorted(gather_object(together(own_share)))
    lengths, ended, kl = (np.array([row[column] for row in rows]) for column in (2, 3, 4))
    return Answers([row[1] for row in rows], lengths, ended, kl)
