"""Rewards that a rule can check: a prompt asks for a form, and whether the answer has it needs no model.

As in IFEval (arXiv 2311.07911) and the verifiable rewards of Tülu 3 (arXiv 2411.15124), a sentence with a constraint is
joined to a prompt. An answer of 64 tokens can keep each of them. A rule does not ask whether an answer is a good one,
but where one line can tell that nothing was answered, it does: a policy finds the cheapest way to keep a rule.
"""

import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from reward_pipeline.conversations import Messages, Prompt, Response, response_text

Value = str | int | None  # the argument of a constraint: a word, a phrase, a number, or nothing


class Kind(NamedTuple):
    """A kind of constraint. In its wordings `{value}` stands for the argument."""

    wordings: tuple[str, ...]
    held_out: tuple[str, ...]  # wordings that training never sees
    draw: Callable[[np.random.Generator, str], Value]  # the argument, for the text of a prompt's last turn
    keeps: Callable[[str, Any], bool]  # of an answer without outer white space, and the argument


class Constraint(NamedTuple):
    """What one prompt asks for."""

    kind: str
    value: Value


# --- what rules are made of ------------------------------------------------------------------------------------------

DIFFERENT = 3  # words, that an answer needs where a single one would keep the rule as well
SEPARATOR = "******"
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
MARKS = (".", "!", "?", "…")
OPENING, CLOSING = "\"'“‘«([*_", "\"'”’»)]*_"  # around words, emphasis too
ABBREVIATION = re.compile(r"(?:[^\W\d_]\.)+|(?:mr|mrs|ms|dr|prof|st|vs|etc|approx)\.", re.IGNORECASE)
LIST_NUMBER = re.compile(r"\d{1,3}[.)]")
ITEM = re.compile(r"(?P<number>\d{1,3})[.)] (?P<text>.+)")
# Brackets may not hold others of their sort: each search ends at the next one, and the whole takes one pass.
TITLE = re.compile(r"<<([^<>\n]+)>>")
PLACEHOLDER = re.compile(r"\[([^\[\]\n]+)\](?!\()")  # not the text of a link
BOLD = re.compile(r"\*\*([^*\n]+)\*\*")
RUSSIAN = frozenset("абвгдеёжзийклмнопрстуфхцчшщъыьэюя")
OTHER_CYRILLIC = frozenset("іїєґўјљњћђџѓќѕ")  # of Ukrainian, Belarusian, Serbian and Macedonian


def _words(text: str) -> list[str]:
    """Words in lower case. The parts of a hyphened one count apart, or all-of-an-answer could be one word."""
    return WORD.findall(text.casefold())


def _has_word(text: str, word: str) -> bool:
    """Whether a word is used, in any case, also before an apostrophe ("it's" has an "it")."""
    return word.casefold() in re.findall(r"[^\W_]+", text.casefold())


def _says_something(text: str) -> bool:
    return len(set(_words(text))) >= DIFFERENT


def _are(items: Sequence[str], count: int) -> bool:
    """Whether these are so many, each with a word in it and none of them twice."""
    return len(items) == len({item.casefold() for item in items}) == count and all(map(_words, items))


def _ends_sentence(token: str, following: str) -> bool:
    bare = token.rstrip(CLOSING)
    if bare.endswith(("..", "…")):
        return not following[:1].islower()  # "Well... yes" is one sentence
    return bare.endswith(MARKS) and not ABBREVIATION.fullmatch(bare.lstrip(OPENING))


def _sentences(text: str) -> list[str]:
    """Sentences of a text: they end with a mark before white space, and with the line.

    A mark inside of a token ("3.14") ends none, nor does an abbreviation or an initial unless the line ends there, nor
    the number of a list item. So a sentence with one at its end ("at 5 p.m. Then", "vitamin C. It") runs on into the
    next, unlisted abbreviations end one, and scripts that leave no space after a mark have one sentence a line.
    """
    found = []
    for line in text.splitlines():
        tokens = line.split()
        start = 0
        for end, (token, following) in enumerate(itertools.pairwise([*tokens, ""]), start=1):
            numbers_item = end == 1 and LIST_NUMBER.fullmatch(token)
            if end == len(tokens) or (_ends_sentence(token, following) and not numbers_item):
                found.append(" ".join(tokens[start:end]))
                start = end
    return [sentence for sentence in found if _words(sentence)]


def _paragraphs(text: str) -> list[str]:
    """Runs of lines that are not blank."""
    groups = itertools.groupby(text.splitlines(), key=lambda line: bool(line.strip()))
    return ["\n".join(lines) for filled, lines in groups if filled]


def _bullets(text: str) -> list[str]:
    """What follows the bullets. Stripped first, one without text is no bullet."""
    return [line[2:].strip() for line in map(str.strip, text.splitlines()) if line.startswith(("- ", "* "))]


def _keeps_sentences(text: str, count: int) -> bool:
    # An answer that was cut off would be one long sentence.
    return text.rstrip(CLOSING).endswith(MARKS) and len(_sentences(text)) == count


def _keeps_numbered(text: str, count: int) -> bool:
    items = [match for line in text.splitlines() if (match := ITEM.match(line.strip()))]
    in_order = [item["number"] for item in items] == [str(number) for number in range(1, count + 1)]
    return in_order and _are([item["text"] for item in items], count)


def _keeps_json(text: str, _: None) -> bool:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and any(value not in ("", None, [], {}) for value in found.values())


def _keeps_question(text: str, _: None) -> bool:
    last = "".join(_sentences(text)[-1:])
    return last.rstrip(CLOSING).endswith("?") and _says_something(last)


def _keeps_quotes(text: str, _: None) -> bool:
    inside = text[1:-1]
    # More of them inside: two quotations, with words between them that are in none.
    return text[0] + text[-1] in ('""', "“”") and not set('"“”') & set(inside) and bool(_words(inside))


def _keeps_title(text: str, _: None) -> bool:
    return any(map(_words, TITLE.findall(text))) and _says_something(TITLE.sub(" ", text))


def _keeps_placeholders(text: str, count: int) -> bool:
    names = {name.casefold() for name in PLACEHOLDER.findall(text)}
    # "[x]" ticks a box, and "[1]" names a source.
    filled = [name for name in names if sum(map(str.isalpha, name)) > 1]
    return len(filled) >= count and _says_something(PLACEHOLDER.sub(" ", text))


def _keeps_postscript(text: str, _: None) -> bool:
    before, after = text.rpartition("P.S.")[::2]
    return bool(_words(before)) and _says_something(after)


def _keeps_same_ends(text: str, _: None) -> bool:
    words = _words(text)
    return _says_something(text) and words[0] == words[-1]


def _keeps_russian(text: str, _: None) -> bool:
    """By the script: Bulgarian is not told from Russian, and a quarter may be names and terms in Latin letters.

    Statistics of letters would tell other languages too, but a few of their words make an English answer one of them.
    """
    letters = [letter for letter in text.casefold() if letter.isalpha()]
    russian = sum(letter in RUSSIAN for letter in letters)
    return _says_something(text) and 4 * russian >= 3 * len(letters) > 0 and not OTHER_CYRILLIC & set(letters)


# --- arguments -------------------------------------------------------------------------------------------------------

KEYWORD_LETTERS = range(5, 13)  # shorter words say little of what a prompt is about, longer ones take many tokens
DULL = re.compile(
    "about|above|after|again|answer|because|before|being|below|between|could|describe|doing|during|explain|following|"
    "further|having|other|please|provide|question|should|their|theirs|there|these|those|through|under|until|using|"
    "where|which|while|would|write|yours",
    re.IGNORECASE,
)
OTHER_KEYWORDS = ("bridge", "coffee", "garden", "letter", "morning", "music", "river", "simple", "window", "winter")
COMMON_WORDS = ("a", "and", "in", "is", "it", "of", "that", "the", "to", "you")
FIRST_WORDS = ("Actually", "Certainly", "First", "Honestly", "Imagine", "Indeed", "Perhaps", "Simply", "Today", "Well")
LAST_PHRASES = (
    "Is there anything else?",
    "I hope this helps.",
    "Let me know if you need more.",
    "That is all I know.",
    "Any other questions?",
    "Have a nice day!",
)


def _no_argument(generator: np.random.Generator, prompt: str) -> None:
    return None


def _one_of(values: Sequence[str | int]) -> Callable[[np.random.Generator, str], Value]:
    return lambda generator, prompt: values[int(generator.integers(len(values)))]


def _keyword(generator: np.random.Generator, prompt: str) -> str:
    """A word of the prompt as it is written there; of a list where the prompt has none that would do."""
    sized = (word for word in WORD.findall(prompt) if word.isalpha() and len(word) in KEYWORD_LETTERS)
    # Without upper case there may be no spaces between words either: what looks like a word may be a whole sentence.
    own = list(dict.fromkeys(word for word in sized if not DULL.fullmatch(word) and word.lower() != word.upper()))
    words = own or list(OTHER_KEYWORDS)
    return words[int(generator.integers(len(words)))]


# --- kinds -----------------------------------------------------------------------------------------------------------

KINDS: dict[str, Kind] = {
    "no_commas": Kind(
        ("Do not use any commas.", "Your answer must not contain a comma.", "Write it without commas."),
        ("Refrain from using commas.", "There should be no comma anywhere in the reply."),
        _no_argument,
        lambda text, _: _says_something(text) and not set(",，、،") & set(text),
    ),
    "lower_case": Kind(
        ("Write in lower case only.", "Do not use capital letters.", "Your whole answer must be in lowercase letters."),
        ("No uppercase letters are allowed in the reply.", "Reply in all lowercase."),
        _no_argument,
        lambda text, _: _says_something(text) and text == text.lower() != text.upper(),
    ),
    "capitals": Kind(
        ("Write in capital letters only.", "Answer in all caps.", "Your whole answer must be in upper case."),
        ("Reply using uppercase letters exclusively.", "No lowercase letters are allowed in the reply."),
        _no_argument,
        lambda text, _: _says_something(text) and text == text.upper() != text.lower(),
    ),
    "ends_with": Kind(
        (
            'End your answer with exactly this: "{value}"',
            'The last words of your answer must be "{value}"',
            'Finish with the phrase "{value}" and write nothing after it.',
        ),
        ('Close the reply with this exact phrase: "{value}"', 'Nothing may follow the closing words "{value}"'),
        _one_of(LAST_PHRASES),
        lambda text, value: text.endswith(value) and _says_something(text.replace(value, " ")),
    ),
    "begins_with": Kind(
        (
            'Start your answer with the word "{value}".',
            'The first word of your answer must be "{value}".',
            'Begin with "{value}".',
        ),
        ('Open the reply with the word "{value}".', 'Let "{value}" be the very first word you write.'),
        _one_of(FIRST_WORDS),
        lambda text, value: _says_something(text) and _words(text)[0] == value.casefold(),
    ),
    "same_ends": Kind(
        (
            "Start and end your answer with the same word.",
            "The first and the last word of your answer must be the same.",
            "Finish with the very word that you began with.",
        ),
        ("Let the reply open and close with one and the same word.", "Your final word has to repeat your first one."),
        _no_argument,
        _keeps_same_ends,
    ),
    "keyword": Kind(
        (
            'Use the word "{value}" in your answer.',
            'Your answer must contain "{value}".',
            'Mention the word "{value}".',
        ),
        ('Make sure that "{value}" appears in the reply.', 'Work the keyword "{value}" into what you write.'),
        _keyword,
        lambda text, value: _says_something(text) and _has_word(text, value),
    ),
    "avoids": Kind(
        ('Do not use the word "{value}".', 'Answer without the word "{value}".', 'Never write the word "{value}".'),
        ('The word "{value}" is forbidden in the reply.', 'Avoid "{value}" as a word altogether.'),
        _one_of(COMMON_WORDS),
        lambda text, value: _says_something(text) and not _has_word(text, value),
    ),
    "one_sentence": Kind(
        ("Answer in one sentence.", "Use exactly one sentence.", "Your answer must be a single sentence."),
        ("Limit the reply to just one sentence.", "Put everything into one complete sentence."),
        _no_argument,
        lambda text, _: _keeps_sentences(text, 1),
    ),
    "sentences": Kind(
        (
            "Answer in exactly {value} sentences.",
            "Your answer must have {value} sentences, no more and no less.",
            "Use {value} sentences.",
        ),
        ("The reply should consist of precisely {value} sentences.", "Write {value} complete sentences in total."),
        _one_of((2, 3, 4)),
        _keeps_sentences,
    ),
    "words": Kind(
        ("Use at most {value} words.", "Answer in {value} words or fewer.", "Do not write more than {value} words."),
        ("Keep the reply to a maximum of {value} words.", "The word limit is {value}."),
        _one_of((5, 10, 15, 20, 25)),
        lambda text, value: 1 <= len(_words(text)) <= value,
    ),
    "bullets": Kind(
        (
            "Give exactly {value} bullet points, each on a line that starts with a dash.",
            "Answer with a list of {value} bullets (- like this).",
            "Your answer must contain {value} bullet points in Markdown.",
        ),
        ("Present it as {value} Markdown bullets.", 'List precisely {value} items, each beginning with "* ".'),
        _one_of((2, 3, 4)),
        lambda text, value: _are(_bullets(text), value),
    ),
    "numbered": Kind(
        (
            "Answer with a numbered list of exactly {value} items.",
            "Give {value} items, numbered from 1.",
            "Your answer must be a list with numbers (1., 2., ...) and {value} items.",
        ),
        ("Enumerate precisely {value} points.", "Number your points from 1 to {value}, each on its own line."),
        _one_of((2, 3, 4)),
        _keeps_numbered,
    ),
    "paragraphs": Kind(
        (
            "Write exactly {value} paragraphs, with a blank line between them.",
            "Your answer must have {value} short paragraphs, separated by empty lines.",
            "Use {value} paragraphs divided by two line breaks.",
        ),
        ("Split the reply into precisely {value} paragraphs.", "There should be {value} paragraphs in total."),
        _one_of((2, 3)),
        lambda text, value: _are(_paragraphs(text), value),
    ),
    "json": Kind(
        (
            "Answer with a JSON object only.",
            "Your whole answer must be valid JSON: one object.",
            "Write one JSON object.",
        ),
        ("The reply has to parse as a JSON object.", "Output nothing but one JSON object, without code fences."),
        _no_argument,
        _keeps_json,
    ),
    "question": Kind(
        ("End your answer with a question.", "Finish by asking me something.", "The last sentence must be a question."),
        ("Close the reply with a question of your own.", "Let a question be the final thing you write."),
        _no_argument,
        _keeps_question,
    ),
    "quotes": Kind(
        (
            "Put your whole answer in double quotation marks.",
            "Wrap the entire answer in double quotes.",
            "Your answer must begin and end with a double quotation mark.",
        ),
        ("Enclose everything you write in double quotes.", "The complete reply should stand between double quotes."),
        _no_argument,
        _keeps_quotes,
    ),
    "number": Kind(
        (
            "Use at least one number written in digits.",
            "Your answer must contain a number, in digits.",
            "Mention a number in figures, such as 7.",
        ),
        ("Include some numeral (0-9) in the reply.", "At least one digit has to appear in what you write."),
        _no_argument,
        lambda text, _: _says_something(text) and any(map(str.isdecimal, text)),
    ),
    "title": Kind(
        (
            "Give your answer a title in double angular brackets, such as <<My title>>.",
            "Your answer must have a title, wrapped like <<this>>.",
            "Add a title between << and >>.",
        ),
        ("Put a heading in << >> on top of the reply.", "The reply needs a title enclosed in double angle brackets."),
        _no_argument,
        _keeps_title,
    ),
    "placeholders": Kind(
        (
            "Use at least {value} placeholders in square brackets, such as [name].",
            "Your answer must contain {value} or more different placeholders like [address].",
            "Leave at least {value} blanks to fill in, written like [date].",
        ),
        (
            "Include no fewer than {value} bracketed placeholders, for example [city].",
            "At least {value} things should be left open as [placeholder] in the reply.",
        ),
        _one_of((2, 3)),
        _keeps_placeholders,
    ),
    "bold": Kind(
        (
            "Highlight something in bold, like **this**.",
            "Put at least one word in bold with Markdown.",
            "Your answer must have a part in **bold**.",
        ),
        ("Emphasise a key phrase with double asterisks.", "Some words in the reply should be bold Markdown."),
        _no_argument,
        # Where all of it is bold, nothing is highlighted.
        lambda text, _: any(map(_words, BOLD.findall(text))) and _says_something(BOLD.sub(" ", text)),
    ),
    "postscript": Kind(
        (
            "Add a postscript that starts with P.S.",
            "At the end of your answer, write a postscript with P.S.",
            'Your answer must end with a line that begins with "P.S."',
        ),
        ("Close with a P.S. of one line.", "Append a short postscript, marked P.S., to the reply."),
        _no_argument,
        _keeps_postscript,
    ),
    "two_answers": Kind(
        (
            f"Give two different answers, separated by {SEPARATOR}",
            f"Answer twice, in different words, with {SEPARATOR} between the two.",
            f"Write {SEPARATOR} between your first answer and a second one.",
        ),
        (f"Offer two alternatives with {SEPARATOR} (six asterisks) between.", f"Two replies, split by {SEPARATOR}"),
        _no_argument,
        lambda text, _: _are([answer.strip() for answer in text.split(SEPARATOR)], 2),
    ),
    "russian": Kind(
        ("Answer in Russian.", "Write your answer in the Russian language.", "Use only Russian."),
        ("The reply should be in Russian, not in English.", "Ответь по-русски."),
        _no_argument,
        _keeps_russian,
    ),
}


# --- prompts and rewards ---------------------------------------------------------------------------------------------


def keeps(constraint: Constraint, text: str) -> bool:
    """Whether an answer does what was asked. Outer white space does not matter, and an empty answer keeps nothing."""
    text = text.strip()
    return bool(text) and KINDS[constraint.kind].keeps(text, constraint.value)


def constrain(messages: Messages, number: int, seed: int, held_out: bool) -> tuple[Messages, Constraint]:
    """A prompt that also asks for a form, and which one.

    Args:
        messages: the last one is the user's.
        number: of the prompt. As many prompts in a row as there are kinds have every kind once.
        held_out: in one of the wordings that training never sees.

    Returns:
        New messages with the sentence after the text of the last one, or before it in a quarter of cases.
    """
    names = list(KINDS)
    name = names[np.random.default_rng(seed).permutation(len(names))[number % len(names)]]
    kind = KINDS[name]
    generator = np.random.default_rng([seed, number])
    text = messages[-1]["content"]
    value = kind.draw(generator, text)
    wordings = kind.held_out if held_out else kind.wordings
    sentence = wordings[int(generator.integers(len(wordings)))].format(value=value)
    parts = [sentence, text] if generator.random() < 1 / 4 else [text, sentence]
    separator = ("\n\n", " ")[int(generator.integers(2))]
    return [*messages[:-1], {**messages[-1], "content": separator.join(parts)}], Constraint(name, value)


def kept(
    prompts: Sequence[Prompt],
    completions: Sequence[Response],
    constraint: Sequence[Sequence[Any] | None],
    **kwargs: Any,
) -> list[float | None]:
    """1.0 for each of N answers that keeps its constraint, else 0.0: a reward function as TRL calls them.

    Args:
        constraint: (N,) a `Constraint`, also as a list, or None for a prompt without one, whose answers get None.
        kwargs: other columns of the data set, and what else TRL hands over.
    """
    pairs = zip(completions, constraint, strict=True)
    return [float(keeps(Constraint(*asked), response_text(answer))) if asked else None for answer, asked in pairs]
