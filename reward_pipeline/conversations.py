"""A conversation becomes token ids: the one place where text is formatted, split into turns and cut to length.

In:  a prompt (plain string, string with HelpSteer2's `<extra_id_1>` markers, or message list) and a response.
Out: token ids that every stage shares, so that training, evaluation and REINFORCE see the same model input.

    messages = parse_prompt("Hi\n<extra_id_1>Assistant\nHello!\n<extra_id_1>User\nHow are you?")
    ids = encode(tokenizer, messages, "Fine, thanks.", max_length=256)

The ids are those of plain `transformers`, `tokenizer.apply_chat_template(messages)`, and end with the token that ends
the answer: the one whose score OpenRLHF or a PPO would read. Two things differ. Strings of control tokens inside a text
stay text: a response can not end its own turn or open another. And there is a length rule: what fits is never cut;
where the whole is longer than `max_length`, the prompt may use half of that (a longer one loses its middle), and the
response keeps its beginning and takes all that is left.
"""

import datetime
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2

if TYPE_CHECKING:  # the library takes seconds to load, and a prompt can be checked without it
    from transformers import PreTrainedTokenizerBase

PROMPT_SHARE = 0.5  # of max_length, that the prompt may use where the whole does not fit
CHUNK = 1024  # conversations that are tokenised at once
MIN_MAX_LENGTH = 32  # tokens; below that a cut prompt could not keep its role headers, some 4 ids on either side
SHOWN = 60  # characters of a turn that a message shows

ROLES = ("system", "user", "assistant")
ROLE_NAMES = {  # under which other tools know the three, in lower case
    **{role: role for role in ROLES},
    **{"developer": "system", "human": "user", "gpt": "assistant", "bot": "assistant"},
}
# A marker alone on its line, as HelpSteer2 writes them; one within a line is somebody's text about markers.
TURN_MARKER = re.compile(r"^[ \t]*<extra_id_\d+>[ \t]*(System|User|Assistant)[ \t]*(?:\r?\n|\Z)", re.MULTILINE)
STRAY_MARKER = re.compile(r"<extra_id_\d+>")
DEFAULT_SYSTEM_PROMPT = re.compile(
    r"\{%-?\s*if loop\.first and messages\[0\]\['role'\] != 'system'\s*-?%\}.*?\{%-?\s*endif\s*-?%\}", re.DOTALL
)
GENERATION = re.compile(r"\{%(?P<left>[-+]?)\s*(?P<end>end)?generation\s*(?P<right>[-+]?)%\}")
TODAY = re.compile(r"strftime_now\(\s*(?P<quote>['\"])(?P<format>.*?)(?P=quote)\s*\)")
DAY = datetime.date(2025, 1, 1)  # in templates that write today's
GUARD = "\ue000"  # private-use character; see `_guard_for`
# The line break after `set` is eaten by `transformers`, so that the template still begins at the start of a line.
CAPTURE = "{% set conversation %}\n"
STRIP = "{% endset %}{{ conversation if add_generation_prompt else conversation.rstrip() }}"

Messages = list[dict[str, str]]
Prompt = str | Sequence[dict[str, str]]  # in any form that `parse_prompt` takes
Response = str | Sequence[dict[str, str]]  # in any form that `response_text` takes
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
    """Chat template in which the token that ends an answer is the last one, and which says nothing of its own.

    The edits leave templates alone that do not contain the construct, and are idempotent:

    - no default system prompt: it has no preference signal and takes the room of two sentences;
    - the date of today is a fixed one: the same text would have other ids tomorrow;
    - outer white space of contents is trimmed;
    - no white space after the last turn. ChatML writes a line break there, and a head that reads the last token would
      read that one, while other tools take the score at the end token. Between turns, and before a generation prompt,
      all stays as it was.
    """
    template = DEFAULT_SYSTEM_PROMPT.sub("", template)
    template = TODAY.sub(lambda call: repr(DAY.strftime(call["format"])), template)
    template = template.replace("+ message['content'] +", "+ message['content'] | trim +")
    if template.startswith(CAPTURE):
        return template
    # Marks of what the assistant wrote would count from the start of the captured text: no marks are better than wrong
    # ones. An `if` keeps the white space control of the tag.
    template = GENERATION.sub(
        lambda tag: f"{{%{tag['left']} {'endif' if tag['end'] else 'if true'} {tag['right']}%}}", template
    )
    return CAPTURE + template.removesuffix("\n") + STRIP  # Jinja itself drops a line break at the very end


def parse_prompt(prompt: Prompt) -> Messages:
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


def response_text(response: Response) -> str:
    """Text of the answer: the string itself, or the last message of a list; for the others see `turns_before_answer`.

    Raises:
        TypeError: neither a string nor a list of messages.
        ValueError: the last message is not the assistant's.
    """
    if isinstance(response, str):
        return _clean(response)
    if not isinstance(response, Sequence):
        raise TypeError(f"a response is a string or a list of messages, not {type(response).__name__}")
    if not response:
        raise ValueError("the response has no messages")
    message = _checked_message(response[-1])
    if message["role"] != "assistant":
        raise ValueError(f"the response must end with an assistant turn, not with {message['role']!r}")
    return message["content"]


def turns_before_answer(prompt: Prompt, response: Response) -> Messages:
    """The turns that an answer was given to: those of the prompt, and those of a message list before its last answer.

    The list may begin with the prompt's turns, which are not doubled, or go on after them with the assistant's.

    Raises:
        TypeError, ValueError: as `parse_prompt` and `response_text`; the list begins with another prompt, or its last
            answer does not follow a user turn.
    """
    messages = parse_prompt(prompt)
    response_text(response)
    earlier = [] if isinstance(response, str) else [_checked_message(message) for message in response[:-1]]
    if not earlier:
        return messages
    # HelpSteer2_binarized packs a whole dialogue, markers included, into one user message.
    packed = _parse_markers(earlier[0]["content"]) if [each["role"] for each in earlier] == ["user"] else []
    if stripped_turns(messages) in (stripped_turns(earlier[: len(messages)]), stripped_turns(packed)):
        rest = earlier[len(messages) :]
    elif earlier[0]["role"] == "assistant":
        rest = earlier
    else:
        raise ValueError(f"the response answers {_shown(earlier)}, but the prompt is {_shown(messages)}")
    if rest and rest[-1]["role"] != "user":
        raise ValueError(f"the last answer of the response must follow a user turn, not {rest[-1]['role']!r}")
    return [*messages, *rest]


def stripped_turns(messages: Messages) -> list[tuple[str, str]]:
    """Role and text of each turn; two prompts are the same if these are."""
    return [(message["role"], message["content"].strip()) for message in messages]


def dialogue_messages(turns: Iterable[tuple[str, str]] | Messages) -> Messages:
    """Messages of a whole dialogue, which is a message list already or (user text, answer) pairs.

    Raises:
        TypeError: it is neither.
        ValueError: unknown role.
    """
    given: list[Any] = list(turns)
    if given and all(isinstance(turn, dict) for turn in given):
        return [_checked_message(turn) for turn in given]
    for number, turn in enumerate(given):
        if not isinstance(turn, tuple | list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise TypeError(f"turn {number}: a dialogue is a message list or (user text, answer) pairs")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in given for role, text in zip(roles, turn, strict=True)]


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Prompt,
    response: Response,
    max_length: int,
    *,
    halve_prompt: bool = False,
) -> list[int]:
    """Token ids of one prompt and response, at most `max_length` of them, template included; see `encode_batch`."""
    return encode_batch(tokenizer, [prompt], [response], max_length, halve_prompt=halve_prompt)[0].ids


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, limit: int | None = None) -> list[int]:
    """Token ids up to where the response starts: what `encode` puts before any response to this prompt.

    Args:
        limit: in tokens; a longer prompt loses its middle.
    """
    opening, _ = _render(tokenizer, _special_tokens(tokenizer), parse_prompt(prompt))
    (ids,) = _tokenize(tokenizer, [opening])
    return ids if limit is None else _cut_middle(ids, limit)


def first_refused(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt]) -> tuple[int, str] | None:
    """Index of the first of N prompts that can not be encoded, because the chat template refuses it, and why."""
    special = _special_tokens(tokenizer)
    for index, prompt in enumerate(prompts):
        try:
            _render(tokenizer, special, parse_prompt(prompt))
        except ValueError as error:
            return index, str(error)
    return None


def encode_batch(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    max_length: int,
    *,
    halve_prompt: bool = False,
) -> list[Encoded]:
    """Encode many conversations with one tokenizer call; each result is the same as if encoded alone.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        prompts: N prompts, in any form that `parse_prompt` takes.
        responses: N answers, in any form that `response_text` takes; what a message list has before its last answer is
            context, by the rule of `turns_before_answer`. Special-token strings in prompts and responses are encoded as
            ordinary text.
        max_length: limit in tokens for prompt, response and template together.
        halve_prompt: keep the prompt to its half of `max_length` also where the whole would fit. Reward models of
            earlier versions were trained so; see `models.trained_with_halved_prompts`.

    Returns:
        N `Encoded`, in input order.

    Raises:
        TypeError, ValueError: as `turns_before_answer`; the numbers of prompts and responses differ,
            `max_length` is too small, or the chat template refuses a prompt.
    """
    if max_length < MIN_MAX_LENGTH:
        raise ValueError(f"max_length is {max_length}, but must be at least {MIN_MAX_LENGTH} tokens")
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts, but {len(responses)} responses")
    special = _special_tokens(tokenizer)
    rendered: dict[str, tuple[Frame, Frame]] = {}
    frames = []
    for prompt, response in zip(prompts, responses, strict=True):
        messages = turns_before_answer(prompt, response)
        key = repr(messages)  # the two answers of a pair share a prompt, rendered and tokenised once
        if key not in rendered:
            rendered[key] = _render(tokenizer, special, messages)
        frames.append(rendered[key])
    parts = {part for frame in rendered.values() for part in frame}
    frame_ids = dict(zip(parts, _tokenize(tokenizer, parts), strict=True))
    response_ids = _tokenize_text(tokenizer, [response_text(response).strip() for response in responses])
    return [
        _assemble(frame_ids[opening], body, frame_ids[closing], max_length, halve_prompt)
        for (opening, closing), body in zip(frames, response_ids, strict=True)
    ]


def encode_stream(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    max_length: int,
    *,
    halve_prompt: bool = False,
) -> Iterator[Encoded]:
    """As `encode_batch`, for any number of conversations: only some of them are in memory before the cut."""
    for start in range(0, max(len(prompts), len(responses)), CHUNK):
        part = slice(start, start + CHUNK)
        yield from encode_batch(tokenizer, prompts[part], responses[part], max_length, halve_prompt=halve_prompt)


def _assemble(
    prompt_ids: list[int], response_ids: list[int], closing_ids: list[int], max_length: int, halve_prompt: bool
) -> Encoded:
    """Apply the length rule. A cut response is closed like a whole one: the head always reads the same token."""
    whole_length = len(prompt_ids) + len(response_ids) + len(closing_ids)
    if whole_length > max_length or halve_prompt:
        # Cut at the end alone, one pair in three would lose all that its two answers differ in.
        kept_prompt = _cut_middle(prompt_ids, int(max_length * PROMPT_SHARE))
    else:
        kept_prompt = prompt_ids
    room = max_length - len(kept_prompt) - len(closing_ids)
    return Encoded(
        ids=kept_prompt + response_ids[:room] + closing_ids,
        prompt_length=len(prompt_ids),
        response_length=len(response_ids),
        whole_length=whole_length,
        prompt_cut=len(kept_prompt) < len(prompt_ids),
        response_cut=room < len(response_ids),
    )


def _cut_middle(ids: list[int], limit: int) -> list[int]:
    """The start and the end of a prompt: a task is mostly stated at one of the two."""
    if len(ids) <= limit:
        return ids
    head = limit // 2
    return ids[:head] + ids[len(ids) - (limit - head) :]


def _parse_markers(text: str) -> Messages:
    """Turns of a text; HelpSteer2 writes earlier ones between markers, the first of which is the user's unmarked."""
    first, *rest = TURN_MARKER.split(_clean(text))
    turns = [("user", first), *zip((role.lower() for role in rest[::2]), rest[1::2], strict=True)]
    messages = [{"role": role, "content": STRAY_MARKER.sub("", content).strip()} for role, content in turns]
    if len(messages) > 1 and not messages[0]["content"]:
        del messages[0]  # the text opens with a marker
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
        del messages[-1]  # a trailing `<extra_id_1>Assistant` only asks for the answer
    return messages


def _checked_message(message: Any) -> dict[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        raise TypeError('a message is {"role": …, "content": …} with a string as content')
    role = ROLE_NAMES.get(str(message.get("role")).lower())
    if role is None:
        raise ValueError(f"unknown role {message.get('role')!r:.40}; known are {', '.join(ROLES)}")
    return {"role": role, "content": _clean(message["content"])}


def _shown(messages: Messages) -> str:
    """Turns in one line of a message, the long ones not in full."""
    turns = [
        f"{role}: {text if len(text) <= SHOWN else text[:SHOWN] + '…'!r}" for role, text in stripped_turns(messages)
    ]
    return f"[{', '.join(turns)}]"


def _clean(text: str) -> str:
    """Lone surrogates (broken JSON escapes) can not be encoded as UTF-8; they become `?`."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """Matches any control token; the longest first, since some begin with others."""
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens.update(tokenizer.all_special_tokens)
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))


def _guard_for(messages: Messages) -> str:
    """A string that occurs in none of the contents: one GUARD more than their longest run of it."""
    runs = (len(run) for message in messages for run in re.findall(f"{GUARD}+", message["content"]))
    return GUARD * (1 + max(runs, default=0))


def _render(tokenizer: "PreTrainedTokenizerBase", special: re.Pattern[str], messages: Messages) -> tuple[Frame, Frame]:
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
        text = str(tokenizer.apply_chat_template([*protected, {"role": "assistant", "content": slot}], tokenize=False))
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses these messages ({error})") from error
    if text.count(slot) != 1:
        raise ValueError("the chat template does not show the assistant's answer exactly once")
    before, after = text.split(slot)
    return _segments(special, before, guard), _segments(special, after, guard)


def _segments(special: re.Pattern[str], text: str, guard: str) -> Frame:
    """Rendered text cut at its control tokens. Guards go only now, when the contents have been read as text."""
    segments: list[tuple[bool, str]] = []
    position = 0
    for match in special.finditer(text):
        segments += [(False, text[position : match.start()]), (True, match[0])]
        position = match.end()
    segments.append((False, text[position:]))
    # A segment's text is tokenised in one piece: template and content may share a token, such as two line breaks.
    return tuple((control, part.replace(guard, "")) for control, part in segments if part)


def _tokenize_text(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts without any control token among them: `split_special_tokens` is what makes text stay text."""
    if not texts:
        return []  # the tokenizer refuses an empty batch
    return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]


def _tokenize(tokenizer: "PreTrainedTokenizerBase", frames: Iterable[Frame]) -> list[list[int]]:
    """Token ids of rendered segments: control tokens by name, text as text."""
    frames = list(frames)
    texts = list(dict.fromkeys(part for frame in frames for control, part in frame if not control))
    ids = dict(zip(texts, _tokenize_text(tokenizer, texts), strict=True))
    control_id: Callable[[str], Any] = tokenizer.convert_tokens_to_ids
    return [[i for control, part in frame for i in ([control_id(part)] if control else ids[part])] for frame in frames]
