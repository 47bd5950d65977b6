"""Texts that hold whole dialogues become message lists: lists written as text, transcripts, filled chat templates.

Only a text that is such a thing as a whole is read; what merely has markup in it stays what it is.
"""

import ast
import itertools
import json
import re
import warnings
from typing import Any, NamedTuple

from reward_pipeline.conversations import ASKING, ROLE_NAMES, Messages, turns_before_answer
from reward_pipeline.sources import BadRow

# --- lists as text ---------------------------------------------------------------------------------------------------

LITERAL_LIMIT = 1_000_000  # characters of a Python literal; its parser takes a hundred times that in memory
KEYS = [re.compile(rf"""(["'])(?:{names})\1\s*:""") for names in ("role|from", "content|value")]
CUT_OFF = re.compile(r"""\[\s*\{\s*["'](?:role|from)["']\s*:""")  # the start of a list, where its end is missing
# What NumPy leaves out between the items of an array, and adds around one in another; strings are passed over.
NUMPY = re.compile(
    r"""(?P<text>(?:'(?:[^'\\]|\\.)*+(?:'|\Z)|"(?:[^"\\]|\\.)*+(?:"|\Z)))(?:\s+(?=['"]))?"""
    r"""|(?P<gap>\}\s+(?=\{)|(?<=[\d.])\s+(?=[-\d]))|\barray(?=\()|,\s*dtype=\w+""",
    re.DOTALL,
)


def listed_messages(value: Any) -> Any:
    """A message list written as text, JSON or as Python or NumPy print it, as a list; other values stay as they are.

    One message alone is a list of one. A struct of lists, `{"role": […], "content": […]}`, which is how Parquet may
    hold a list of structs, is a message list too.

    Raises:
        BadRow: the text looks like a message list and can not be read.
    """
    if not isinstance(value, str):
        return _as_list(value)
    text = value.strip()
    if CUT_OFF.match(text) and not text.endswith("]"):
        raise BadRow("message list in a text can not be read")
    if text[:1] + text[-1:] not in ("[]", "{}") or (text[0] == "[" and not text[1:].lstrip().startswith("{")):
        return value
    if not all(key.search(text) for key in KEYS):
        return value
    try:
        found = _as_list(from_text(text))
    except ValueError as error:
        raise BadRow("message list in a text can not be read") from error
    return found if isinstance(found, list) and all(map(_is_message, found)) else value


def from_text(text: str) -> Any:
    """What a text says in JSON, or as Python or NumPy print it.

    Raises:
        ValueError: it is neither.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError:
        if len(text) > LITERAL_LIMIT:
            raise
    literal = NUMPY.sub(_as_python, text)
    try:
        with warnings.catch_warnings():  # of escapes that Python does not know
            warnings.simplefilter("ignore")
            return ast.literal_eval(literal)
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:  # the last two: brackets in brackets
        raise ValueError("no literal of Python") from error


def _as_python(found: re.Match[str]) -> str:
    if text := found["text"]:
        return text if text == found[0] else f"{text}, "  # NumPy has no commas, and Python would make one of the two
    return f"{found[0].strip()}, " if found["gap"] else ""


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(
        not value.keys().isdisjoint(names) for names in (("role", "from"), ("content", "value"))
    )


def _as_list(value: Any) -> Any:
    if not _is_message(value):
        return value
    columns = {name: each for name, each in value.items() if isinstance(each, list)}
    if "role" in columns and "content" in columns and len({len(each) for each in columns.values()}) == 1:
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [value]


# --- transcripts -----------------------------------------------------------------------------------------------------


class Transcript(NamedTuple):
    """One way to write a dialogue as text."""

    name: str
    opening: re.Pattern[str]  # of a turn; its group is the role
    words: bool = False  # that people write too, and not tokens
    least: int = 1  # turns; fewer may be a matter of chance


SPEAKERS = "Human|User|USER|Assistant|ASSISTANT|System"
TRANSCRIPTS = (
    Transcript("ChatML", re.compile(r"<\|im_start\|>[ \t]*(\w+)[ \t]*(?:\n|\Z)")),
    Transcript("Llama 3", re.compile(r"<\|start_header_id\|>\s*(\w+)\s*<\|end_header_id\|>")),
    Transcript("Gemma", re.compile(r"<start_of_turn>[ \t]*(\w+)[ \t]*(?:\n|\Z)")),
    Transcript("Zephyr, Phi", re.compile(r"<\|(system|user|assistant)\|>")),
    Transcript("Llama 2, Mistral", re.compile(r"(\[/?INST\])")),
    Transcript("hh-rlhf", re.compile(rf"(?:\A\s*|\n\n)({SPEAKERS}):"), words=True, least=2),
    Transcript("hh-rlhf", re.compile(rf"(?:\A\s*|\n[ \t]*)({SPEAKERS}):"), words=True),  # with line breaks alone
    Transcript("Guanaco", re.compile(rf"(?:\A\s*|\n[ \t]*)#{{2,3}} ?({SPEAKERS}):"), words=True),
    Transcript("Alpaca", re.compile(r"(?:\A\s*|\n[ \t]*)### ?(Instruction|Input|Response):"), words=True),
)
SPEAKER_ROLES = {**ROLE_NAMES, "[inst]": "user", "[/inst]": "assistant", "instruction": "user", "response": "assistant"}
# The start of a filled template: a token, or Alpaca's sentence.
OPENING = re.compile(
    r"\s*(?:<s>|<\|begin_of_text\|>|<bos>|<\|endoftext\|>"
    r"|Below is an instruction that describes a task[^#]*request\.)?\s*"
)
# The end of a turn in it; a `<s>` opens the next one.
ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "</s>", "<s>", "<eos>")
SYSTEM = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>(.*)", re.DOTALL)


def without_end(text: str) -> str:
    """A text without the tokens that end a turn; one without any stays as it is."""
    stop, ended = len(text), False
    while True:
        while stop and text[stop - 1].isspace():
            stop -= 1
        end = next((end for end in ENDS if text.endswith(end, 0, stop)), None)
        if end is None:
            return text[:stop] if ended else text
        stop, ended = stop - len(end), True


def transcript(text: str) -> tuple[Transcript, Messages] | None:
    """How a text is a transcript as a whole, and its turns, the last one perhaps an empty one of the assistant.

    None for any other text: one that opens with no turn, has an empty one, or two of one role after each other.
    """
    text = text[OPENING.match(text).end() :]  # type: ignore[union-attr]  # it matches nothing as well
    for form in TRANSCRIPTS:
        if not form.opening.match(text):
            continue
        _, *parts = form.opening.split(text)
        turns: Messages = []
        for name, content in zip(parts[::2], parts[1::2], strict=True):
            content = without_end(content).strip()
            if name == "Input" and turns:  # Alpaca's second field
                turns[-1]["content"] += f"\n{content}"
                continue
            role = SPEAKER_ROLES.get(name.lower())
            if role == "user" and not turns and (rules := SYSTEM.fullmatch(content)):
                turns.append({"role": "system", "content": rules[1].strip()})
                content = rules[2].strip()
            turns.append({"role": role, "content": content})
        roles = [turn["role"] for turn in turns]
        if (
            len(turns) >= form.least
            and None not in roles
            and "system" not in roles[1:]
            and all(one != other or one == "tool" for one, other in itertools.pairwise(roles))
            and all(turn["content"] for turn in turns[:-1])
            and (turns[-1]["content"] or roles[-1] == "assistant")
        ):
            return form, turns
    return None


def asked_turns(text: str, alone: bool = True) -> Messages | None:
    """The turns of a prompt that is a transcript; an empty last one of the assistant only asks for the answer.

    Args:
        alone: nothing but the prompt tells. Then words count only where they ask for the answer: people show their
            models dialogues, and `User: …` may be one.
    """
    form, turns = transcript(text) or (None, [])
    if turns and not turns[-1]["content"]:
        turns = turns[:-1]
    elif form and form.words and alone:
        return None
    begins = next((turn["role"] for turn in turns if turn["role"] != "system"), None)
    return turns if begins == "user" and turns[-1]["role"] in ASKING else None


def answered_turns(text: str) -> Messages | None:
    """The turns of a transcript that ends with an answer."""
    _, turns = transcript(text) or (None, [])
    return turns if turns and turns[-1]["role"] == "assistant" and turns[-1]["content"] else None


def read_transcripts(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its prompt, and a pair's answers, as messages where they are transcripts; answers without the prompt.

    Answers are changed only where both are of one kind: a story told as a dialogue is an answer too.
    """
    prompt = row.get("prompt")
    answers: list[Any] = [row.get("chosen"), row.get("rejected")]
    if not all(isinstance(answer, str) for answer in answers):
        lists = [answer for answer in answers if isinstance(answer, list) and len(answer) > 1]
        literal = any(_answers(prompt, answer) for answer in lists)  # they repeat it as one text
        turns = asked_turns(prompt) if isinstance(prompt, str) and not literal else None
        return {**row, "prompt": turns} if turns else row
    if prompt and all(dialogues := [answered_turns(answer) for answer in answers]):
        for asked in (asked_turns(prompt, alone=False) if isinstance(prompt, str) else None, prompt):
            if asked and all(_answers(asked, dialogue) for dialogue in dialogues):
                return {**row, "prompt": asked, "chosen": dialogues[0], "rejected": dialogues[1]}
    turns = asked_turns(prompt) if isinstance(prompt, str) else None
    if isinstance(prompt, str) and _repeated(prompt, answers):
        answers = [answer[len(prompt) :] for answer in answers]
    ended = [without_end(answer) for answer in answers]
    if turns or all(bare != answer for bare, answer in zip(ended, answers, strict=True)):
        answers = ended
    return {**row, "prompt": turns or prompt, "chosen": answers[0], "rejected": answers[1]}


def _answers(prompt: Any, dialogue: Any) -> bool:
    try:
        return bool(turns_before_answer(prompt, dialogue))
    except (TypeError, ValueError):
        return False


def _repeated(prompt: str, answers: list[str]) -> bool:
    """Whether both answers begin with the prompt, and not by chance: answers to "Hello" may both begin with that."""
    return (
        len(prompt.split()) >= 3
        and all(answer.startswith(prompt) and answer[len(prompt) :].strip() for answer in answers)
        and (
            prompt.rstrip()[-1] in ".?!:…。？！：؟"
            or all(answer[len(prompt) :].lstrip(" ").startswith("\n") for answer in answers)
        )
    )
