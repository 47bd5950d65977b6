"""Who answers in the arena: models that sample, and files of answers; and what they are asked."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reward_pipeline.conversations import (
    Messages,
    Prompt,
    encode_prompt,
    parse_prompt,
    response_text,
    turns_before_answer,
)
from reward_pipeline.devices import pick_device
from reward_pipeline.file_scoring import checked_rows, row_answers
from reward_pipeline.files import InputError
from reward_pipeline.formats import FILE_TYPES, file_type
from reward_pipeline.models import end_token_ids, load_sft_model, load_tokenizer, positions, resolve_model
from reward_pipeline.pairs import prompt_key
from reward_pipeline.sampling import PolicyPrompt, sampling_config, stream
from reward_pipeline.schemas import in_turns
from reward_pipeline.sources import open_source
from reward_pipeline.transcripts import answered_turns, asked_turns, listed_messages
from reward_pipeline.votes import Duel


class Asked(NamedTuple):
    """A prompt of the arena."""

    messages: Messages
    category: str = ""


class Contestant(NamedTuple):
    """One of those who answer.

    Attributes:
        name: of the author, in votes.
        answer: to a prompt and a seed the answer as it grows, all of it each time; raises InputError where there is
            none.
        prompts: those that it has answers to; None where it answers any.
    """

    name: str
    answer: Callable[[Messages, int], Iterator[str]]
    prompts: list[Asked] | None = None


def is_file_of_answers(name: str) -> bool:
    """Whether a contestant's name is that of a file, and not of a model."""
    return Path(name).is_file() or file_type(Path(name)) in FILE_TYPES


def contestants(names: Sequence[str], temperatures: Sequence[float], max_new_tokens: int) -> list[Contestant]:
    """The two who answer, in the order of their names.

    Args:
        names: two models (directories or hub ids) or two files of answers; the same model twice is loaded once.
        temperatures: one for each; they become part of the names where these are the same.

    Raises:
        InputError: a name stands for neither, both are the same in all, or one is a model and the other one a file.
    """
    files = [is_file_of_answers(name) for name in names]
    if all(files):
        if len({Path(name).resolve() for name in names}) == 1:
            raise InputError(f"{names[0]}: stands on both sides; name a second file of answers")
        answering = [from_file(name) for name in names]
        in_common(answering)
        return answering
    if any(files):
        raise InputError(f"{' and '.join(names)}: one is a file and one a model; name two of a kind")
    same = len(set(names)) == 1
    shown = [f"{name} (temperature {heat:g})" if same else name for name, heat in zip(names, temperatures, strict=True)]
    if len(set(shown)) == 1:
        raise InputError(f"{names[0]}: stands on both sides at one temperature; name two models or two temperatures")
    loaded = {name: _loaded(name) for name in dict.fromkeys(names)}
    return [
        _sampling(title, *loaded[name], heat, max_new_tokens)
        for title, name, heat in zip(shown, names, temperatures, strict=True)
    ]


def _loaded(name: str) -> tuple[Any, Any]:
    path = resolve_model(name).path
    return load_sft_model(path).to(pick_device()), load_tokenizer(path)


def _sampling(name: str, model: Any, tokenizer: Any, temperature: float, max_new_tokens: int) -> Contestant:
    config = sampling_config(max_new_tokens, temperature, end_token_ids(model, tokenizer), tokenizer.pad_token_id)

    def answer(messages: Messages, seed: int) -> Iterator[str]:
        try:
            ids = encode_prompt(tokenizer, messages)
        except ValueError as error:
            raise InputError(f"{name}: {error}") from error
        if len(ids) + max_new_tokens > (most := positions(model)):
            raise InputError(f"the prompt has {len(ids)} tokens, and {name} takes {most - max_new_tokens}; shorten it")
        yield from stream(model, tokenizer, PolicyPrompt(messages, ids, "the prompt"), config, seed)

    return Contestant(name, answer)


def from_file(name: str) -> Contestant:
    """A file with rows of `prompt` and `response`, as a contestant of its name; of equal prompts the first counts.

    Raises:
        InputError: it can not be read, a row has another number of answers than one, or there is none.
    """
    answers: dict[int, tuple[Asked, str]] = {}
    for place, row in checked_rows(open_source(name).rows):
        given = row_answers(row)
        if list(given) != ["response"]:
            raise InputError(f"{place}: has {', '.join(given)}; a file of answers has one response in each row")
        messages = turns_before_answer(in_turns(row)["prompt"], given["response"])
        asked = Asked(messages, str(row.get("category") or ""))
        answers.setdefault(prompt_key(messages), (asked, response_text(given["response"])))
    if not answers:
        raise InputError(f"{name}: has no rows")

    def answer(messages: Messages, seed: int) -> Iterator[str]:
        if (key := prompt_key(messages)) not in answers:
            raise InputError(f"{name}: has no answer to this prompt; leave it empty to get one that it has")
        yield answers[key][1]

    return Contestant(name, answer, [asked for asked, _ in answers.values()])


def in_common(answering: Sequence[Contestant]) -> list[Asked]:
    """The prompts that all files of answers have, in the order of the first one.

    Raises:
        InputError: there are none.
    """
    others = [{prompt_key(asked.messages) for asked in each.prompts or []} for each in answering[1:]]
    common = [
        asked for asked in answering[0].prompts or [] if all(prompt_key(asked.messages) in keys for keys in others)
    ]
    if not common:
        raise InputError(f"{' and '.join(each.name for each in answering)}: have no prompt in common")
    return common


def unseen(split: Any) -> list[Asked]:
    """The different prompts of a processed split, each with its category."""
    first: dict[str, Asked] = {}
    for messages, category in zip(split["prompt"], split["category"], strict=True):
        first.setdefault(json.dumps(messages), Asked(messages, category))
    return [*first.values()]


def next_prompt(typed: str, prompts: Sequence[Asked], seen: Iterable[int], draw: np.random.Generator) -> Asked:
    """What to ask: what somebody typed, otherwise a prompt that they have not voted on yet, if there is one.

    Raises:
        InputError: nothing is typed, and there are no prompts.
    """
    if typed.strip():
        return Asked(read_prompt(typed))
    if not prompts:
        raise InputError("there is no prepared prompt; type one")
    known = set(seen)
    fresh = [asked for asked in prompts if prompt_key(asked.messages) not in known] or [*prompts]
    return fresh[int(draw.integers(len(fresh)))]


def read_prompt(text: str) -> Messages:
    """A prompt as people type it: a text, a transcript with `User:` and `Assistant:` lines, or a message list as JSON.

    Raises:
        InputError: it is empty, or its turns can not be answered.
    """
    if not text.strip():
        raise InputError("the prompt is empty")
    try:
        listed = listed_messages(text)
        # A transcript is a dialogue here, also one with an answer at its end, which then is told.
        turns = asked_turns(text, alone=False) or answered_turns(text)
        prompt: Prompt = turns or text if isinstance(listed, str) else listed
        messages = parse_prompt(prompt)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the prompt can not be read: {error}") from error
    if not messages[-1]["content"].strip():
        raise InputError("the prompt is empty")
    return messages


def fight(asked: Asked, answering: Sequence[Contestant], draw: np.random.Generator) -> Iterator[Duel]:
    """The duel as its two answers grow, who stands left decided by chance; the last one is whole.

    Raises:
        InputError: as `Contestant.answer`; an answer is empty, or both are the same, and there is nothing to vote on.
    """
    left, right = (answering[number] for number in draw.permutation(len(answering)))
    seeds = draw.integers(2**31, size=2).tolist()
    growing = [each.answer(asked.messages, seed) for each, seed in zip((left, right), seeds, strict=True)]
    texts = ["", ""]
    more = True
    while more:
        more = False
        for side, answer in enumerate(growing):
            if (text := next(answer, None)) is not None:
                texts[side], more = text, True
        yield Duel(asked.messages, texts[0], texts[1], left.name, right.name, asked.category)
    if not all(text.strip() for text in texts):
        raise InputError("an answer is empty, so there is nothing to vote on; ask again")
    if texts[0].strip() == texts[1].strip():
        raise InputError("both answers are the same, so there is nothing to vote on; ask again")
