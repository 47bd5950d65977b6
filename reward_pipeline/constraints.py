"""Rewards that can be verified: a sentence joined to a prompt asks for something that a rule can check.

As in IFEval (arXiv 2311.07911) and RLVR (arXiv 2411.15124), but with constraints that an answer of 64 tokens can keep,
and several wordings of each: a policy trained on some is evaluated on others. What a rule checks, it checks to the
letter; whether the answer is any good, no rule of these can tell.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from reward_pipeline.conversations import Messages, Response, response_text

Value = str | int | None  # the argument of a constraint, such as a word or a number

ENDINGS = ("Is there anything else?", "That is all I know.", "Hope this helps!", "Stay curious.", "The end.")
OPENINGS = ("Well", "Indeed", "Yes", "Listen", "Briefly")
KEYWORDS = ("today", "simple", "people", "water", "music", "future", "small", "green")  # where a prompt has no word
COMMON_WORDS = ("the", "and", "is", "of", "to", "a")
LEAST_WORDS = 3  # of an answer that is to leave something out: one word leaves out nearly everything
WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
BULLET = re.compile(r"^[ \t]*[-*•][ \t]+\S", re.MULTILINE)
# A mark and then white space or the end. Decimals have none after them; "e.g. this" is counted as two sentences, which
# only a model of the language would know better.
SENTENCE_END = re.compile(r"[.!?…]+[\"”’')\]]*(?=\s|$)")


class Kind(NamedTuple):
    """A kind of constraint; `{value}` in its wordings stands for the argument."""

    wordings: tuple[str, ...]  # for training
    held_out: tuple[str, ...]  # for evaluation alone
    keeps: Callable[[str, Any], bool]  # of an answer without outer white space, which is not empty, and the argument
    draw: Callable[[np.random.Generator, str], Value] = lambda generator, text: None  # from the text of the last turn


class Constraint(NamedTuple):
    """What an answer has to keep."""

    kind: str
    value: Value


def _one_of(values: Sequence[Value]) -> Callable[[np.random.Generator, str], Value]:
    return lambda generator, text: values[int(generator.integers(len(values)))]


def _keyword(generator: np.random.Generator, text: str) -> str:
    """A longer word of the prompt."""
    words = sorted({word.lower() for word in WORD.findall(text) if 4 <= len(word) <= 10}) or KEYWORDS
    return words[int(generator.integers(len(words)))]


def _words(text: str) -> list[str]:
    return [word.lower() for word in WORD.findall(text)]


def _sentences(text: str) -> int:
    """Number of sentences; what follows the last mark counts as one, since a completion may be cut."""
    rest = SENTENCE_END.split(text)[-1]
    return len(SENTENCE_END.findall(text)) + bool(WORD.search(rest))


def _is_object(text: str) -> bool:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):  # the latter for thousands of brackets
        return False
    return isinstance(found, dict) and bool(found)


def _lower(text: str, _: Value) -> bool:
    return text == text.lower() and text != text.upper()  # some letters are needed


def _upper(text: str, _: Value) -> bool:
    return text == text.upper() and text != text.lower()


def _without(pattern: str) -> Callable[[str, Value], bool]:
    return lambda text, _: not re.search(pattern, text) and len(text.split()) >= LEAST_WORDS


KINDS = {
    "no_comma": Kind(
        ("Do not use any commas.", "Write without commas.", "Your answer must not contain a comma."),
        ("Avoid commas altogether.", "Commas are forbidden in your reply."),
        _without(","),
    ),
    "lower_case": Kind(
        ("Write everything in lower case.", "Use lowercase letters only.", "Do not use any capital letters."),
        ("Your whole reply should be lowercase.", "No uppercase letters are allowed."),
        _lower,
    ),
    "upper_case": Kind(
        ("Write everything in capital letters.", "Use uppercase letters only.", "ANSWER IN ALL CAPS."),
        ("Your whole reply should be in capitals.", "No lowercase letters are allowed."),
        _upper,
    ),
    "ending": Kind(
        (
            'End your answer with the exact phrase "{value}"',
            'Finish with the words "{value}" and nothing after them.',
            'The last words of your response must be "{value}"',
        ),
        ('Close your reply with "{value}"', 'Your reply has to stop right after "{value}"'),
        lambda text, value: text.endswith(value) and len(text) > len(value),
        _one_of(ENDINGS),
    ),
    "opening": Kind(
        (
            'Begin your answer with the word "{value}".',
            'Start with "{value}".',
            'The first word of your response must be "{value}".',
        ),
        ('Open your reply with the word "{value}".', 'Let "{value}" be the first word you write.'),
        lambda text, value: _words(text)[:1] == [value.lower()] and len(_words(text)) > 1,
        _one_of(OPENINGS),
    ),
    "keyword": Kind(
        (
            'Include the word "{value}" in your answer.',
            'Use the word "{value}" at least once.',
            'Your response must mention "{value}".',
        ),
        ('Make sure that "{value}" appears in your reply.', 'The word "{value}" has to be in it.'),
        lambda text, value: value in _words(text) and len(_words(text)) >= LEAST_WORDS,
        _keyword,
    ),
    "forbidden_word": Kind(
        (
            'Do not use the word "{value}".',
            'Avoid the word "{value}".',
            'Your answer must not contain the word "{value}".',
        ),
        ('The word "{value}" is forbidden.', 'Write your reply without the word "{value}".'),
        lambda text, value: value not in _words(text) and len(_words(text)) >= LEAST_WORDS,
        _one_of(COMMON_WORDS),
    ),
    "sentences": Kind(
        (
            "Answer in exactly {value} sentence(s).",
            "Write {value} sentence(s), no more and no fewer.",
            "Your answer should have {value} sentence(s).",
        ),
        ("Use precisely {value} sentence(s).", "Limit your reply to exactly {value} sentence(s)."),
        lambda text, value: _sentences(text) == value,
        _one_of((1, 2, 3)),
    ),
    "few_words": Kind(
        (
            "Use at most {value} words.",
            "Answer in no more than {value} words.",
            "Keep your answer under {value} words or at exactly {value}.",
        ),
        ("Your reply must not be longer than {value} words.", "{value} words are the maximum."),
        lambda text, value: len(text.split()) <= value,
        _one_of((5, 10, 15, 20)),
    ),
    "bullets": Kind(
        (
            'Answer with exactly {value} bullet points that start with "- ".',
            'Write {value} bullet points, each on a line that starts with "- ".',
            'Give a list of exactly {value} bullets ("- ").',
        ),
        ('Your reply should have exactly {value} items with "- " in front.', 'List {value} points, using "- ".'),
        lambda text, value: len(BULLET.findall(text)) == value,
        _one_of((2, 3)),
    ),
    "json": Kind(
        ("Answer with a JSON object only.", "Give your answer as JSON.", "Your whole response must be a JSON object."),
        ("Format the entire reply as a JSON object.", "Reply in valid JSON and nothing else."),
        lambda text, _: _is_object(text),
    ),
    "question": Kind(
        ("End with a question.", "Finish your answer with a question.", "The last sentence must be a question."),
        ("Close your reply by asking something.", "Your reply has to end with a question mark."),
        lambda text, _: text.endswith("?") and len(text.split()) >= LEAST_WORDS,
    ),
    "quotation": Kind(
        (
            "Put your whole answer in double quotation marks.",
            "Wrap your response in double quotes.",
            'Start and end your answer with a double quotation mark (").',
        ),
        ("Your entire reply should be enclosed in double quotes.", "Quote your full reply with double quotes."),
        lambda text, _: text[:1] in ('"', "“") and text[-1:] in ('"', "”") and bool(WORD.search(text)),
    ),
    "number": Kind(
        ("Include at least one number in digits.", "Use a digit somewhere.", "Mention a number, written in digits."),
        ("Your reply needs a number in numerals.", "At least one digit has to appear."),
        lambda text, _: bool(re.search(r"\d", text)) and len(_words(text)) >= LEAST_WORDS,
    ),
    "title": Kind(
        (
            "Begin with a title in double angular brackets, such as <<my title>>.",
            "Add a title wrapped in <<double angular brackets>>.",
            "Your answer must contain a title like <<this>>.",
        ),
        ("Give your reply a title inside << and >>.", "Put a heading of the form <<heading>> into it."),
        lambda text, _: bool(re.search(r"<<[^<>\n]*\w[^<>\n]*>>", text)),
    ),
    "exclamation": Kind(
        ("End with an exclamation mark.", "Finish your answer with an exclamation mark.", 'The last character must be "!".'),
        ('Close your reply with "!".', "Your reply has to end with an exclamation mark."),
        lambda text, _: text.endswith("!") and len(text.split()) >= LEAST_WORDS,
    ),
    "russian": Kind(
        ("Answer in Russian.", "Write your response in the Russian language.", "Use Russian only."),
        ("Reply in Russian, please.", "Отвечай по-русски."),
        lambda text, _: _cyrillic_share(text) > 0.8,
    ),
}  # fmt: skip


def _cyrillic_share(text: str) -> float:
    """Of the letters. The script is what a rule can tell for sure of so short a text; other languages share theirs."""
    letters = [letter for letter in text.lower() if letter.isalpha()]
    return sum("а" <= letter <= "я" or letter == "ё" for letter in letters) / len(letters) if letters else 0.0


def keeps(constraint: Constraint, text: str) -> bool:
    """Whether an answer keeps a constraint; outer white space aside. An empty one keeps none."""
    stripped = text.strip()
    return bool(stripped) and KINDS[constraint.kind].keeps(stripped, constraint.value)


def constrain(messages: Messages, number: int, seed: int, held_out: bool) -> tuple[Messages, Constraint]:
    """Messages with a constraint joined to their last turn, before or after its text; what comes in stays as it is.

    Args:
        messages: end with a user turn of text.
        number: of the prompt, by which the kinds take turns: all are equally frequent.
        seed: of the order of the kinds, the arguments and wordings.
        held_out: take a wording that no training sees.
    """
    kinds = [*KINDS]
    name = kinds[np.random.default_rng([seed, number // len(kinds)]).permutation(len(kinds))[number % len(kinds)]]
    generator, kind = np.random.default_rng([seed, number, 1]), KINDS[name]
    text = messages[-1]["content"]
    value = kind.draw(generator, text)
    wordings = kind.held_out if held_out else kind.wordings
    sentence = wordings[int(generator.integers(len(wordings)))].replace("{value}", str(value))
    joined = (f"{text}\n\n{sentence}", f"{text} {sentence}", f"{sentence}\n\n{text}")[int(generator.integers(3))]
    return [*messages[:-1], {**messages[-1], "content": joined}], Constraint(name, value)


def kept(
    prompts: Sequence[Any],
    completions: Sequence[Response],
    constraint: Sequence[Sequence[Any] | None],
    **columns: Any,
) -> list[float]:
    """Reward function of TRL's signature: 1 for a completion that keeps the constraint of its prompt, else 0.

    Args:
        prompts: N; not read.
        completions: N answers, strings or message lists.
        constraint: N, each as `Constraint` or `[kind, value]`; None for a prompt without one, whose completion gets 0.
        columns: what else TRL passes; not used.
    """
    return [
        float(each is not None and keeps(Constraint(*each), response_text(completion)))
        for each, completion in zip(constraint, completions, strict=True)
    ]
