"""Prompts and sampled completions."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import GenerationConfig

from reward_pipeline.conversations import Messages, encode_prompt
from reward_pipeline.devices import autocast
from reward_pipeline.files import InputError, at_places
from reward_pipeline.models import positions
from reward_pipeline.pairs import draw
from reward_pipeline.processes import together
from reward_pipeline.reinforce import (
    REMEDY,
    Completions,
    DivergedError,
    completion_mask,
    has_ended,
    log_probabilities,
    sequence_kl,
    step_seed,
)


class PolicyPrompt(NamedTuple):
    """A prompt as messages, and as the ids that come before its completion."""

    messages: Messages
    ids: list[int]
    place: str  # the first pair with it, for messages


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


def batches(prompts: Sequence[PolicyPrompt], size: int, seed: int) -> Iterator[list[PolicyPrompt]]:
    """Endless batches of `size` prompts: every pass in its own order, the same for the same seed."""
    order: list[int] = []
    for epoch in itertools.count():
        order += np.random.default_rng([seed, epoch]).permutation(len(prompts)).tolist()
        while len(order) >= size:
            yield [prompts[index] for index in order[:size]]
            del order[:size]


def sampling_config(max_new_tokens: int, temperature: float, end_ids: list[int], pad_id: int) -> GenerationConfig:
    """Plain sampling from the distribution that is scored: no top-k, top-p or penalties."""
    return GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=end_ids,
        pad_token_id=pad_id,
    )


def check_room(model: Any, name: str, length: int) -> None:
    """Make sure that a model takes prompts and completions of so many tokens together.

    Raises:
        InputError: it was not made for so many.
    """
    room = positions(model)
    if length > room:
        raise InputError(f"--max_prompt_length and --max_new_tokens are more than the {room} tokens that {name} takes")


def refuse_non_finite(prompts: Sequence[PolicyPrompt]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Logits processor that changes nothing; drawing from NaN would end in an obscure error."""

    def refuse(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        finite = logits.isfinite().all(dim=1).tolist()
        if not all(finite):
            places = [prompt.place for prompt, fine in zip(prompts, finite, strict=True) if not fine]
            raise DivergedError(f"the policy's logits are not finite{at_places(places)}; {REMEDY}")
        return logits

    return refuse


@torch.no_grad()
def sample(
    policy: Any,
    tokenizer: Any,
    prompts: Sequence[PolicyPrompt],
    config: GenerationConfig,
    dtype: torch.dtype | None,
    seed: int,
) -> Completions:
    """One completion for each of B prompts, the same for the same seed.

    Args:
        policy: model of `transformers`; not the wrapper of accelerate, which can not generate.
        config: of `sampling_config`.
        dtype: of autocast; None computes in fp32.

    Raises:
        DivergedError: the policy's logits are not finite.
    """
    set_seed(seed)
    device, width = policy.device, max(len(prompt.ids) for prompt in prompts)
    padding = [width - len(prompt.ids) for prompt in prompts]
    rows = [[config.pad_token_id] * pad + prompt.ids for pad, prompt in zip(padding, prompts, strict=True)]
    masks = [[0] * pad + [1] * len(prompt.ids) for pad, prompt in zip(padding, prompts, strict=True)]
    prompt_mask = torch.tensor(masks, device=device)
    # `generate` fills in what `config` leaves open from the model's own generation settings: penalties, suppressed
    # tokens. The samples would then come from another distribution than the one whose log-probabilities are taken.
    own, policy.generation_config = policy.generation_config, config
    try:
        with autocast(device, dtype):
            ids = policy.generate(
                torch.tensor(rows, device=device),
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
    reference: Any,
    policy: Any,
    *,
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
        reference: what the KL is measured to.
        batch_size: prompts answered at once. Random numbers are drawn batch by batch, so it changes the answers.
        micro_batch_size: completions whose log-probabilities are taken at once.
        title: of the progress bar.

    Raises:
        DivergedError: the policy's logits are not finite.
    """
    first, stride = accelerator.process_index, accelerator.num_processes

    @torch.no_grad()
    def own_share() -> list[tuple[int, str, int, bool, float]]:
        """Place of the prompt, text, tokens, whether it ended, and KL of each answer of this process."""
        rows = []
        starts = range(0, len(prompts), batch_size)[first::stride]
        for start in tqdm(starts, desc=title, unit=" batches", disable=not accelerator.is_main_process):
            sampled = sample(
                policy, tokenizer, prompts[start : start + batch_size], config, dtype, step_seed(seed, 0, start)
            )
            kl: list[float] = []
            for place in range(0, len(sampled.texts), micro_batch_size):
                part = sampled.part(place, micro_batch_size)
                log_probs, others = (
                    log_probabilities(model, part, config.temperature, dtype)[0] for model in (policy, reference)
                )
                kl += sequence_kl(log_probs, others, part.mask).tolist()
            columns = sampled.texts, sampled.mask.sum(dim=1).tolist(), sampled.ended.tolist(), kl
            rows += [(start + place, *row) for place, row in enumerate(zip(*columns, strict=True))]
        return rows

    _, texts, lengths, ended, kl = zip(*sorted(gather_object(together(own_share))), strict=True)
    return Answers(list(texts), np.array(lengths), np.array(ended), np.array(kl))
