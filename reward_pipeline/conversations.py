"""A conversation becomes token ids: the one place where text is formatted, split into turns and cut to length.

In:  a prompt (plain string, string with HelpSteer2's `<extra_id_1>` markers, or message list) and a response.
Out: token ids that every stage shares, so that training, evaluation and REINFORCE see the same model input.

    messages = parse_prompt("Hi\n<extra_id_1>Assistant\nHello!\n<extra_id_1>User\nHow are you?")
    ids = encode(tokenizer, messages, "Fine, thanks.", max_length=256)

The length rule: the prompt may use half of `max_length`; a longer one loses its middle. The response keeps its
beginning and takes all that is left. The prompt ids therefore never depend on the response they are paired with.
"""

import datetime
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jinja2

PROMPT_SHARE = 0.5  # of max_length, that the prompt may use
CHUNK = 1024  # conversations that are tokenised at once
MIN_MAX_LENGTH = 32  # tokens; below that a cut prompt could not keep its role headers

ROLES = ("system", "user", "assistant")
TURN_MARKER = re.compile(r"^[ \t]*<extra_id_\d+>[ \t]*(System|User|Assistant)[ \t]*(?:\r?\n|\Z)", re.MULTILINE)
STRAY_MARKER = re.compile(r"<extra_id_\d+>")
DEFAULT_SYSTEM_PROMPT = re.compile(
    r"\{%-?\s*if loop\.first and messages\[0\]\['role'\] != 'system'\s*-?%\}.*?\{%-?\s*endif\s*-?%\}", re.DOTALL
)
TODAY = re.compile(r"strftime_now\(\s*(?P<quote>['\"])(?P<format>.*?)(?P=quote)\s*\)")
DAY = datetime.date(2025, 1, 1)  # in templates that write today's
GUARD = "\ue000"  # private-use character; see `_guard_for`

Messages = list[dict[str, str]]
Frame = tuple[tuple[bool, str], ...]  # rendered template text as (is control token, text) segments


class Encoded(NamedTuple):
    """Token ids of one conversation, with what the length rule did to it (all counts in tokens)."""

    ids: list[int]
    prompt_length: int  # template included, before the cut
    response_length: int  # response text alone, before the cut
    whole_length: int  # all of it, before the cut
    prompt_cut: bool
    response_cut: bool


def plain_template(template: str) -> str:
    """Chat template without a default system prompt (no preference signal), with outer white space trimmed, undated.

    With today's date in it the same text would have other ids tomorrow. All edits leave templates alone that do not
    contain the construct, and are idempotent.
    """
    template = DEFAULT_SYSTEM_PROMPT.sub("", template)
    template = TODAY.sub(lambda call: repr(DAY.strftime(call["format"])), template)
    return template.replace("+ message['content'] +", "+ message['content'] | trim +")


def parse_prompt(prompt: str | Sequence[dict[str, str]]) -> Messages:
    """Turn any accepted form of a prompt into messages that end with the turn to be answered.

    Args:
        prompt: a plain string, a string in which lines `<extra_id_1>Assistant` / `<extra_id_1>User` open new turns,
            or a list of `{"role": "system" | "user" | "assistant", "content": str}`.

    Raises:
        TypeError: the prompt, a message or a content has the wrong type.
        ValueError: unknown role, no messages, or the last turn is not the user's.
    """
    if isinstance(prompt, str):
        messages = _parse_markers(prompt)
    elif isinstance(prompt, Sequence):
        messages = [_checked_message(message) for message in prompt]
    else:
        raise TypeError(f"a prompt is a string or a list of messages, not {type(prompt).__name__}")
    if not messages:
        raise ValueError("the prompt has no messages")
    if messages[-1]["role"] != "user":
        raise ValueError(f"the prompt must end with a user turn, not with {messages[-1]['role']!r}")
    return messages


def response_text(completion: str | Sequence[dict[str, str]]) -> str:
    """Text of the answer: the string itself, or the last message of a list (which may repeat the user turns).

    Raises:
        TypeError: neither a string nor a list of messages.
        ValueError: the last message is not the assistant's.
    """
    if isinstance(completion, str):
        return _clean(completion)
    if not isinstance(completion, Sequence):
        raise TypeError(f"a response is a string or a list of messages, not {type(completion).__name__}")
    if not completion:
        raise ValueError("the response has no messages")
    message = _checked_message(completion[-1])
    if message["role"] != "assistant":
        raise ValueError(f"the response must end with an assistant turn, not with {message['role']!r}")
    return message["content"]


def encode(tokenizer, prompt: str | Sequence[dict[str, str]], response: str, max_length: int) -> list[int]:
    """Token ids of one prompt and response, at most `max_length` of them, template included."""
    return encode_batch(tokenizer, [prompt], [response], max_length)[0].ids


def encode_prompt(tokenizer, prompt: str | Sequence[dict[str, str]], max_length: int) -> list[int]:
    """Token ids up to where the response starts: what `encode` puts before any response to this prompt."""
    _check_max_length(max_length)
    opening, _ = _render(tokenizer, _special_tokens(tokenizer), parse_prompt(prompt))
    return _cut_middle(_tokenize(tokenizer, [opening])[0], int(max_length * PROMPT_SHARE))


def first_refused(
    tokenizer, prompts: Sequence[str | Sequence[dict[str, str]]], max_length: int
) -> tuple[int, str] | None:
    """Index of the first of N prompts that can not be encoded, because the chat template refuses it, and why."""
    try:
        encode_batch(tokenizer, prompts, [""] * len(prompts), max_length)
    except ValueError:
        for index, prompt in enumerate(prompts):
            try:
                encode_prompt(tokenizer, prompt, max_length)
            except ValueError as error:
                return index, str(error)
        raise
    return None


def encode_batch(
    tokenizer, prompts: Sequence[str | Sequence[dict[str, str]]], responses: Sequence[str], max_length: int
) -> list[Encoded]:
    """Encode many conversations with one tokenizer call; each result is the same as if encoded alone.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        prompts: N prompts, in any form that `parse_prompt` takes.
        responses: N answers. Special-token strings in prompts and responses are encoded as ordinary text.
        max_length: limit in tokens for prompt, response and template together.

    Returns:
        N `Encoded`, in input order.
    """
    _check_max_length(max_length)
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts, but {len(responses)} responses")
    special = _special_tokens(tokenizer)
    rendered: dict[str, tuple[Frame, Frame]] = {}
    frames = []
    for prompt in prompts:
        messages = parse_prompt(prompt)
        key = repr(messages)
        if key not in rendered:
            rendered[key] = _render(tokenizer, special, messages)
        frames.append(rendered[key])
    parts = {part for frame in rendered.values() for part in frame}
    frame_ids = dict(zip(parts, _tokenize(tokenizer, parts), strict=True))
    response_ids = _tokenize_text(tokenizer, [response_text(response).strip() for response in responses])
    return [
        _assemble(frame_ids[opening], body, frame_ids[closing], max_length)
        for (opening, closing), body in zip(frames, response_ids, strict=True)
    ]


def encode_stream(
    tokenizer, prompts: Sequence[str | Sequence[dict[str, str]]], responses: Sequence[str], max_length: int
) -> Iterator[Encoded]:
    """As `encode_batch`, for any number of conversations: only some of them are in memory before the cut."""
    for start in range(0, max(len(prompts), len(responses)), CHUNK):
        part = slice(start, start + CHUNK)
        yield from encode_batch(tokenizer, prompts[part], responses[part], max_length)


def _assemble(prompt_ids: list[int], response_ids: list[int], closing_ids: list[int], max_length: int) -> Encoded:
    """Apply the length rule. A cut response is closed like a whole one: the head always reads the same token."""
    kept_prompt = _cut_middle(prompt_ids, int(max_length * PROMPT_SHARE))
    room = max_length - len(kept_prompt) - len(closing_ids)
    return Encoded(
        ids=kept_prompt + response_ids[:room] + closing_ids,
        prompt_length=len(prompt_ids),
        response_length=len(response_ids),
        whole_length=len(prompt_ids) + len(response_ids) + len(closing_ids),
        prompt_cut=len(kept_prompt) < len(prompt_ids),
        response_cut=room < len(response_ids),
    )


def _cut_middle(ids: list[int], limit: int) -> list[int]:
    if len(ids) <= limit:
        return ids
    head = limit // 2
    return ids[:head] + ids[len(ids) - (limit - head) :]


def _check_max_length(max_length: int) -> None:
    if max_length < MIN_MAX_LENGTH:
        raise ValueError(f"max_length is {max_length}, but must be at least {MIN_MAX_LENGTH} tokens")


def _parse_markers(text: str) -> Messages:
    first, *rest = TURN_MARKER.split(_clean(text))
    turns = [("user", first), *zip((role.lower() for role in rest[::2]), rest[1::2], strict=True)]
    messages = [{"role": role, "content": STRAY_MARKER.sub("", content).strip()} for role, content in turns]
    if len(messages) > 1 and not messages[0]["content"]:
        del messages[0]  # the text opens with a marker
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
        del messages[-1]  # a trailing `<extra_id_1>Assistant` only asks for the answer
    return messages


def _checked_message(message: dict[str, str]) -> dict[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        raise TypeError('a message is {"role": …, "content": …} with a string as content')
    if message.get("role") not in ROLES:
        raise ValueError(f"unknown role {message.get('role')!r}; known are {', '.join(ROLES)}")
    return {"role": message["role"], "content": _clean(message["content"])}


def _clean(text: str) -> str:
    """Lone surrogates (broken JSON escapes) can not be encoded as UTF-8; they become `?`."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _special_tokens(tokenizer) -> re.Pattern:
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens.update(tokenizer.all_special_tokens)
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))


def _guard_for(messages: Messages) -> str:
    """A string that occurs in none of the contents: one GUARD more than their longest run of it."""
    runs = (len(run) for message in messages for run in re.findall(f"{GUARD}+", message["content"]))
    return GUARD * (1 + max(runs, default=0))


def _render(tokenizer, special: re.Pattern, messages: Messages) -> tuple[Frame, Frame]:
    """Fill the chat template with `messages` and an answer; return what stands before and after the answer.

    Only control tokens that the template wrote count: those inside contents are broken by a guard while it is filled.
    """
    guard = _guard_for(messages)
    slot = f"{guard}response{guard}"
    protected = [
        {**message, "content": special.sub(lambda match: match[0][0] + guard + match[0][1:], message["content"])}
        for message in messages
    ]
    try:
        text = tokenizer.apply_chat_template([*protected, {"role": "assistant", "content": slot}], tokenize=False)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses these messages ({error})") from error
    if text.count(slot) != 1:
        raise ValueError("the chat template does not show the assistant's answer exactly once")
    before, after = text.split(slot)
    return _segments(special, before, guard), _segments(special, after, guard)


def _segments(special: re.Pattern, text: str, guard: str) -> Frame:
    segments, position = [], 0
    for match in special.finditer(text):
        segments += [(False, text[position : match.start()]), (True, match[0])]
        position = match.end()
    segments.append((False, text[position:]))
    return tuple((control, part.replace(guard, "")) for control, part in segments if part)


def _tokenize_text(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]


def _tokenize(tokenizer, frames: Iterable[Frame]) -> list[list[int]]:
    """Token ids of rendered segments: control tokens by name, text as text."""
    frames = list(frames)
    texts = list(dict.fromkeys(part for frame in frames for control, part in frame if not control))
    ids = dict(zip(texts, _tokenize_text(tokenizer, texts), strict=True))
    return [
        [i for control, part in frame for i in ([tokenizer.convert_tokens_to_ids(part)] if control else ids[part])]
        for frame in frames
    ]
