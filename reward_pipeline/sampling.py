"""Completions, sampled token by token.

`generate` of `transformers` samples from the same distribution. What it spends beside the model's own products is more
than half of its time on a CPU: it copies all keys and values for every token, draws a random number for every word of
the vocabulary, and goes on with completions that have ended.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import Cache, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from reward_pipeline.constraints import Constraint
from reward_pipeline.conversations import Messages
from reward_pipeline.devices import autocast
from reward_pipeline.files import at_places
from reward_pipeline.reinforce import REMEDY, Completions, DivergedError, completion_mask, has_ended

PROMPTS_AT_ONCE = 8  # of similar length where prompts come in order of length: no short one is padded to the longest


class PolicyPrompt(NamedTuple):
    """A prompt as messages, and as the ids that come before its completion."""

    messages: Messages
    ids: list[int]
    place: str  # the first pair with it, for messages
    constraint: Constraint | None = None  # what the prompt asks of the form of an answer, where a rule can check it


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


class RoomyLayer(DynamicLayer):
    """Keys and values (B, heads, L, D) of a layer, in tensors that have room for the tokens to come."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, room: int):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.roomy = [each.new_empty(*each.shape[:2], room, each.shape[3]) for each in (keys, values)]
        self.keys, self.values = keys[:, :, :0], values[:, :, :0]
        self.update(keys, values)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values of further tokens; returns those of all."""
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for roomy, new in zip(self.roomy, (key_states, value_states), strict=True):
            roomy[:, :, start:end] = new
        self.keys, self.values = (roomy[:, :, :end] for roomy in self.roomy)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """L, also of an empty batch's or a not yet filled one."""
        return self.keys.shape[2]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these of the B rows."""
        length = self.get_seq_length()
        self.roomy = [roomy[indices] for roomy in self.roomy]
        self.keys, self.values = (roomy[:, :, :length] for roomy in self.roomy)


def padded(prompts: Sequence[PolicyPrompt], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, P) ids of prompts, padded on the left, and the mask of what is no padding."""
    width = max(len(prompt.ids) for prompt in prompts)
    rows = [[pad_id] * (width - len(prompt.ids)) + prompt.ids for prompt in prompts]
    masks = [[0] * (width - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(masks, device=device)


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """(B, L) place of every token in its sequence; without it a first token after padding would not be at place 0."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def read(policy: Any, prompts: Sequence[PolicyPrompt], pad_id: int, room: int) -> tuple[Cache, torch.Tensor]:
    """Keys and values of prompts, as if all of them were padded to the longest, and (B, V) logits of what comes next.

    A prompt that stands several times in a row is read once.

    Args:
        room: tokens, for which the cache gets room.
    """
    several = [(prompt, len([*group])) for prompt, group in itertools.groupby(prompts)]
    different = [prompt for prompt, _ in several]
    rows = torch.arange(len(several)).repeat_interleave(torch.tensor([count for _, count in several]))
    rows = rows.to(policy.device)
    width = max(len(prompt.ids) for prompt in prompts)
    # Other kinds of layers (windows, states) are not put together: their prompts are read all at once.
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=policy.config).layers)
    caches, logits = [], []
    size = PROMPTS_AT_ONCE if plain else len(different)
    for start in range(0, len(different), size):
        ids, mask = padded(different[start : start + size], pad_id, policy.device)
        caches.append(DynamicCache(config=policy.config))
        output = policy(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions_of(mask),
            past_key_values=caches[-1],
            use_cache=True,
            logits_to_keep=1,
        )
        logits.append(output.logits[:, -1])
    if not plain:
        caches[0].batch_select_indices(rows)
        return caches[0], logits[0][rows]

    def together(states: Sequence[torch.Tensor]) -> torch.Tensor:
        """Keys or values of all parts, each padded on the left to the longest prompt."""
        return torch.cat([torch.nn.functional.pad(each, (0, 0, width - each.shape[2], 0)) for each in states])[rows]

    layers: list[Any] = [
        RoomyLayer(together([layer.keys for layer in parts]), together([layer.values for layer in parts]), room)
        for parts in zip(*(cache.layers for cache in caches), strict=True)
    ]
    return Cache(layers=layers), torch.cat(logits)[rows]


def drawn(logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """(B,) token ids by (B, V) logits: where the cumulated probabilities pass a number.

    Args:
        numbers: (B,) uniform from [0, 1). One for each token, where `torch.multinomial` draws one for each word of the
            vocabulary: a quarter of the time of a token on a CPU.

    Returns:
        The ids; at rows whose logits are not finite they have no meaning, see `refuse_non_finite`.
    """
    cumulated = logits.softmax(dim=1).cumsum(dim=1)
    total = cumulated[:, -1:].contiguous()
    passed = torch.searchsorted(cumulated, numbers[:, None] * total, right=True)
    # By rounding the product can be the total, which nothing passes; then the last token that has a probability.
    return torch.minimum(passed, torch.searchsorted(cumulated, total))[:, 0]


def refuse_non_finite(logits: torch.Tensor, prompts: Sequence[PolicyPrompt]) -> None:
    """Stop where (B, V) logits are none to draw from.

    Raises:
        DivergedError: some are NaN or infinite.
    """
    # One number a row instead of a look at every logit: NaN, infinity, and nothing but minus infinity show in it.
    finite = logits.logsumexp(dim=1).isfinite().tolist()
    if not all(finite):
        places = [prompt.place for prompt, fine in zip(prompts, finite, strict=True) if not fine]
        raise DivergedError(f"the policy's logits are not finite{at_places(places)}; {REMEDY}")


@torch.no_grad()
def tokens(
    policy: Any, prompts: Sequence[PolicyPrompt], config: GenerationConfig, seeds: Sequence[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """One completion for each of B prompts, token by token; see `sample`.

    Yields:
        After each token (B, P + T) ids of the prompts, padded on the left to P tokens, and of the completions, padded
        to the T tokens that there may be; the mask (B, P + T) of what is no padding on the left; and the place of the
        token.
    """
    device, most = policy.device, config.max_new_tokens
    ids, mask = padded(prompts, config.pad_token_id, device)
    width, end_ids = ids.shape[1], torch.tensor(config.eos_token_id, device=device)
    numbers = np.array([np.random.default_rng(seed).random(most, dtype=np.float32) for seed in seeds])
    uniform = torch.from_numpy(numbers).to(device)
    ids = torch.cat([ids, ids.new_full((len(prompts), most), config.pad_token_id)], dim=1)
    mask = torch.cat([mask, mask.new_ones(len(prompts), most)], dim=1)
    positions = positions_of(mask)
    going = torch.arange(len(prompts), device=device)  # rows that have not ended
    cache, logits = read(policy, prompts, config.pad_token_id, width + most)
    for place in range(width, width + most):
        logits = logits.float() / config.temperature
        refuse_non_finite(logits, [prompts[row] for row in going.tolist()])
        ids[going, place] = drawn(logits, uniform[going, place - width])
        yield ids, mask, place
        if place + 1 == width + most:
            return
        on = ~torch.isin(ids[going, place], end_ids)
        if not on.all():
            going = going[on]
            if not len(going):
                return
            cache.batch_select_indices(on.nonzero()[:, 0])
        logits = policy(
            input_ids=ids[going, place : place + 1],
            attention_mask=mask[going, : place + 1],
            position_ids=positions[going, place : place + 1],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]


def sample(
    policy: Any,
    tokenizer: Any,
    prompts: Sequence[PolicyPrompt],
    config: GenerationConfig,
    dtype: torch.dtype | None,
    seeds: Sequence[int],
) -> Completions:
    """One completion for each of B prompts, the same for the same seed. A prompt may stand several times in a row.

    Args:
        policy: model of `transformers`; not the wrapper of accelerate.
        config: of `sampling_config`. The model's own generation settings have no say: with penalties and suppressed
            tokens samples would come from another distribution than the one whose log-probabilities are taken.
        dtype: of autocast; None computes in fp32.
        seeds: one for each completion, whose random numbers then do not depend on the others in the batch.

    Raises:
        DivergedError: the policy's logits are not finite.
    """
    width = max(len(prompt.ids) for prompt in prompts)
    with autocast(policy.device, dtype):  # once for all tokens: it keeps the weights that it has cast
        for ids, mask, place in tokens(policy, prompts, config, seeds):  # noqa: B007  # the last ones are used
            pass
    completions = ids[:, width : place + 1]
    kept = completion_mask(completions, config.eos_token_id)
    return Completions(
        ids=ids[:, : place + 1],
        attention_mask=torch.cat([mask[:, :width], kept.long()], dim=1),
        mask=kept,
        ended=has_ended(completions, config.eos_token_id),
        texts=tokenizer.batch_decode(
            [row[keep].tolist() for row, keep in zip(completions, kept, strict=True)], skip_special_tokens=True
        ),
    )


def stream(policy: Any, tokenizer: Any, prompt: PolicyPrompt, config: GenerationConfig, seed: int) -> Iterator[str]:
    """The text of one completion as it grows, in the end the one that `sample` gives in fp32.

    In fp32 alone: between two tokens other code runs, on which autocast would act too.

    Raises:
        DivergedError: the policy's logits are not finite.
    """
    text = shown = ""
    for ids, _, place in tokens(policy, [prompt], config, [seed]):
        text = tokenizer.decode(ids[0, len(prompt.ids) : place + 1], skip_special_tokens=True)
        shown = text.removesuffix("\ufffd")  # a character of which not all bytes are there yet
        yield shown
    if shown != text:  # and never came
        yield text
