"""Prompts and sampled completions."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import set_seed
from datasets import Dataset
from transformers import GenerationConfig

from reward_pipeline.conversations import Messages, encode_prompt
from reward_pipeline.devices import autocast
from reward_pipeline.files import InputError, named
from reward_pipeline.reinforce import REMEDY, DivergedError, completion_mask, has_ended


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
