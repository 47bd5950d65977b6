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
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2

if TYPE_CHECKING:  # the library takes seconds to load, and a prompt can be checked without it
    from transformers import PreTrainedTokenizerBase

PROMPT_SHARE = 0.5  # of max_length, that the prompt may use where the whole does not fit
CHUNK = 1024  # conversations that are tokenised at once
MIN_MAX_LENGTH = 32  # tokens; below that a cut prompt could not keep its role headers, some 4 ids on either side
SHOWN = 60  # characters of a turn that a message shows

ROLES = ("system", "user", "assistant", "tool")
ROLE_NAMES = {  # under which other tools know these, in lower case
    **{role: role for role in ROLES},
    **{
        "developer": "system",
        "human": "user",
        "gpt": "assistant",
        "bot": "assistant",
        "model": "assistant",
        "ai": "assistant",
    },
    **{"function": "tool", "observation": "tool", "ipython": "tool"},
}
ASKING = ("user", "tool")  # roles of the turns that an answer may follow
TEXT_PARTS = ("text", "input_text", "output_text")  # types of a content part that are text
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

Messages = list[dict[str, Any]]  # each with `role` and `content`, and `tool_calls` where an assistant turn has any
Prompt = str | Sequence[dict[str, Any]]  # in any form that `parse_prompt` takes
Response = str | Sequence[dict[str, Any]]  # in any form that `response_text` takes
Frame = tuple[tuple[bool, str], ...]  # rendered template text as (is control token, text) segments


class OtherPrompt(ValueError):
    """A message list answers another prompt than the one beside it."""


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
            or a list of `{"role": "system" | "user" | "assistant" | "tool", "content": str}`. A content may be a list
            of text parts; an assistant turn may have `tool_calls`. A single user message is read like a string.

    Raises:
        TypeError: the prompt, a message or a content has the wrong type.
        ValueError: unknown role, a content part that is no text, no messages, or the last turn is not the user's (nor
            that of a tool).
    """
    if isinstance(prompt, str):
        messages = _parse_markers(prompt)
    elif isinstance(prompt, Sequence):
        messages = _unpacked([_checked_message(message) for message in prompt])
    else:
        raise TypeError(f"a prompt is a string or a list of messages, not {type(prompt).__name__}")
    if not messages:
        raise ValueError("the prompt has no messages")
    if messages[-1]["role"] not in ASKING:
        raise ValueError(f"the prompt must end with a user turn, not with {messages[-1]['role']!r}")
    return messages


def response_text(response: Response) -> str:
    """Text of the answer: the string itself, or the last message of a list; for the others see `turns_before_answer`.

    Raises:
        TypeError: neither a string nor a list of messages.
        ValueError: the last message is not the assistant's, or calls a tool.
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
    if "tool_calls" in message:
        raise ValueError("the response is a tool call, not a text")
    return message["content"]


def turns_before_answer(prompt: Prompt, response: Response) -> Messages:
    """The turns that an answer was given to: those of the prompt, and those of a message list before its last answer.

    The list may hold the prompt's turns, with others before and after them (its system turn may be missing), or go on
    after them with the assistant's.

    Raises:
        OtherPrompt: the list has turns before its answer, but not those of the prompt.
        TypeError, ValueError: as `parse_prompt` and `response_text`; the last answer does not follow a user turn.
    """
    messages = parse_prompt(prompt)
    response_text(response)
    earlier = [] if isinstance(response, str) else _unpacked([_checked_message(message) for message in response[:-1]])
    if not earlier:
        return messages
    system = messages[:1] if messages[0]["role"] == "system" else []
    given, turns = messages[len(system) :], earlier
    if system and _turns(earlier[:1]) == _turns(system):
        turns = earlier[1:]
    known = not system or all(message["role"] != "system" for message in turns)  # not under another system prompt
    wanted, held = _turns(given), _turns(turns)
    starts = (start for start in range(len(held)) if held[start : start + len(wanted)] == wanted)
    start = next(starts, None) if known else None
    if start != 0 and earlier[0]["role"] == "assistant":  # it goes on, even where the user repeats the prompt later
        context = [*messages, *earlier]
    elif start is not None:
        context = [*system, *turns[:start], *given, *turns[start + len(given) :]]
    else:
        raise OtherPrompt(f"the response answers {_shown(earlier)}, but the prompt is {_shown(messages)}")
    if context[-1]["role"] not in ASKING:
        raise ValueError(f"the last answer of the response must follow a user turn, not {context[-1]['role']!r}")
    return context


def stripped_turns(messages: Messages) -> list[tuple[str, ...]]:
    """Role and text of each turn, and its tool calls where it has any; two prompts are the same if these are."""
    return [
        (message["role"], message["content"].strip(), *map(json.dumps, message.get("tool_calls", ())))
        for message in messages
    ]


def _turns(messages: Messages) -> list[tuple[str, ...]]:
    """As `stripped_turns`, without the markers that are taken out of a prompt and may still stand in a list."""
    return stripped_turns([{**message, "content": STRAY_MARKER.sub("", message["content"])} for message in messages])


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


def calls_as_text(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> Messages:
    """The same turns with their tool calls as the text that the chat template makes of them: the ids stay the same.

    Raises:
        ValueError: the template refuses the turns, does not show tool calls, or shows them in another way than as the
            text of an assistant turn.
    """
    special = _special_tokens(tokenizer)
    written = list(messages)
    for place, message in enumerate(messages):
        if "tool_calls" not in message:
            continue
        slot, whole = f"{_guard_for(written)}calls", _filled(tokenizer, written)
        try:
            frame = [*written[:place], {"role": "assistant", "content": slot}, *written[place + 1 :]]
            before, _, after = _filled(tokenizer, frame).partition(slot)
            text = whole[len(before) : len(whole) - len(after)]
            as_text = [*written[:place], {"role": "assistant", "content": text}, *written[place + 1 :]]
            same = _render(tokenizer, special, as_text) == _render(tokenizer, special, written)
        except ValueError:  # no answer of a tool without its call
            same = False
        if not same:
            raise ValueError("the chat template does not write tool calls as text")
        written = as_text
    return written


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


def marked_cuts(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Prompt,
    response: Response,
    max_length: int,
    *,
    halve_prompt: bool = False,
) -> list[tuple[str, bool]]:
    """A conversation in pieces of text, each with whether it is read; what is not, the length rule has cut.

    Args:
        tokenizer, prompt, response, max_length, halve_prompt: as for `encode_batch`.

    Returns:
        All of the conversation, in its order and with the tokens of the template. A character that a cut parts may
        show as two replacement characters.
    """
    pair = tokenizer, [prompt], [response]
    (whole,) = encode_batch(*pair, max_length=sys.maxsize)
    # The rule itself, told of the places of the tokens in place of the tokens, says which ones are left.
    places, end = range(whole.whole_length), whole.prompt_length + whole.response_length
    parts = [*places[: whole.prompt_length]], [*places[whole.prompt_length : end]], [*places[end:]]
    read = set(_assemble(*parts, max_length, halve_prompt).ids)
    pieces = itertools.groupby(places, key=read.__contains__)
    return [(tokenizer.decode([whole.ids[place] for place in piece]), kept) for kept, piece in pieces]


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


def _unpacked(messages: Messages) -> Messages:
    """HelpSteer2_binarized packs whole dialogues, markers included, into one user message."""
    if len(messages) == 1 and messages[0]["role"] == "user" and TURN_MARKER.search(messages[0]["content"]):
        return _parse_markers(messages[0]["content"])
    return messages


def _checked_message(message: Any) -> dict[str, Any]:
    """A message in our words; what else it holds, such as a name, is left aside. ShareGPT says `from` and `value`."""
    if not isinstance(message, dict):
        raise TypeError('a message is {"role": …, "content": …}')
    name = message.get("from") if message.get("role") is None else message["role"]
    role = ROLE_NAMES.get(str(name).lower())
    if role is None:
        raise ValueError(f"unknown role {name!r:.40}; known are {', '.join(ROLES)}")
    content = message.get("value") if message.get("content") is None else message["content"]
    called = message.get("tool_calls") or message.get("function_call") or []  # the second one: OpenAI's earlier name
    calls = [_checked_call(call) for call in (called if isinstance(called, list) else [called])]
    if content is None and calls:
        content = ""
    if isinstance(content, list):
        content = "\n".join(map(_part_text, content))  # as vLLM does for models of text alone
    if not isinstance(content, str):
        raise TypeError('a message is {"role": …, "content": …} with a string as content')
    return {"role": role, "content": _clean(content), **({"tool_calls": calls} if calls else {})}


def _part_text(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
        raise ValueError(f"a content part is {kind!r:.40}; only text can be read")
    return part["text"]


def _checked_call(call: Any) -> dict[str, Any]:
    """A tool call in the form that chat templates take: OpenAI's, whose arguments are JSON text there."""
    try:
        function = call.get("function") or call
        arguments = function["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        # Arrow gives every call the arguments of all calls in its column, most of them empty.
        arguments = {name: value for name, value in arguments.items() if value is not None}
        known = {"type": "function", "function": {"name": str(function["name"]), "arguments": arguments}}
        known = json.loads(_clean(json.dumps({"id": call.get("id"), **known}, ensure_ascii=False)))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError("a tool call has no name, or no arguments by name") from error
    return {name: value for name, value in known.items() if value is not None}


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
    """A string that occurs nowhere in the messages: one GUARD more than their longest run of it."""
    runs = (len(run) for text in _texts(messages) for run in re.findall(f"{GUARD}+", text))
    return GUARD * (1 + max(runs, default=0))


def _texts(value: Any) -> Iterator[str]:
    """All strings in nested lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts([*value, *value.values()])
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)


def _changed_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Nested lists and objects with `change` made to all strings."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(name): _changed_texts(each, change) for name, each in value.items()}
    return [_changed_texts(each, change) for each in value] if isinstance(value, list) else value


def _filled(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> str:
    """The chat template filled with `messages`.

    Raises:
        ValueError: the template refuses them, or passes over what tools are asked or say.
    """
    try:
        # Most templates pass over what they do not know, so it is looked for by words that nothing else has.
        marked, words = _with_marked_tools(messages)
        shown = str(tokenizer.apply_chat_template(marked, tokenize=False)) if words else ""
        for word, what in words.items():
            if word not in shown:
                raise ValueError(f"the chat template does not show {what}")
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (jinja2.TemplateError, TypeError) as error:  # the second one: arguments of a tool in another form
        raise ValueError(f"the chat template refuses these messages ({error})") from error


def _with_marked_tools(messages: Messages) -> tuple[Messages, dict[str, str]]:
    """The messages with a word of its own in place of each tool's name and answer; these words, and what they mean."""
    marked: Messages = []
    words: dict[str, str] = {}
    for message in messages:
        word = f"{GUARD}{len(marked)}{GUARD}"
        if "tool_calls" in message:
            calls = [{**call, "function": {**call["function"], "name": word}} for call in message["tool_calls"]]
            message, words[word] = {**message, "tool_calls": calls}, "tool calls"
        elif message["role"] == "tool":
            message, words[word] = {**message, "content": word}, "what tools say"
        marked.append(message)
    return marked, words


def _render(tokenizer: "PreTrainedTokenizerBase", special: re.Pattern[str], messages: Messages) -> tuple[Frame, Frame]:
    """Fill the chat template with `messages` and an answer; return what stands before and after the answer.

    Only control tokens that the template wrote count: those inside contents are broken by a guard while it is filled.
    """
    guard = _guard_for(messages)
    slot = f"{guard}response{guard}"
    protected = [
        {
            **_changed_texts(message, lambda text: special.sub(lambda match: match[0][0] + guard + match[0][1:], text)),
            "role": message["role"],
        }
        for message in messages
    ]
    text = _filled(tokenizer, [*protected, {"role": "assistant", "content": slot}])
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
