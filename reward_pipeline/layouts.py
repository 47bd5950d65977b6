"""Rows as published elsewhere get our columns: one table of layouts, recognised by their columns.

What `schemas.py` reads is `prompt`, `chosen` and `rejected`, or `prompt`, `response` and `score`; their texts and
messages are checked there. Here columns are found, sides are ordered by what the labels say, and rankings taken apart.
"""

import contextlib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from reward_pipeline.conversations import Messages
from reward_pipeline.files import InputError
from reward_pipeline.formats import ROWS
from reward_pipeline.sources import BadRow, Row
from reward_pipeline.transcripts import answered_turns, from_text, listed_messages, without_end

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")  # of a raw HelpSteer2 row
PROMPT = "prompt|question|instruction|input|query"
SCORE = "score|rating|reward|label"
LABEL = "choice|winner|preferred|preference|label"
ANSWER_A = "answer_a|response_a|output_a|answer_1|response_1|output_1"
ANSWER_B = "answer_b|response_b|output_b|answer_2|response_2|output_2"
LISTS = (
    "answers",
    "completions",
    "generations",
    "responses",
    "ratings",
    "rating",
    "scores",
    "generation_models",
    "history",
)
WINNERS = ("left", "right")  # votes that someone won
NOBODY_WON = {"tie": "tie", "both bad": "both answers are bad", "skip": "vote was skipped"}  # votes, and why they drop
SPOKEN_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")  # as hh-rlhf writes dialogues
DECIMAL_COMMA = re.compile(r"\s*[-+]?\d*,(?!\d{3}\s*\Z)\d+\s*")  # with three digits it may be one between thousands
SHOWN_COLUMNS = 20  # in a message
SIDE = r"(?:model|answer|response|output|assistant|option|conversation)?[ _]?"

Values = dict[str, Any]


class Layout(NamedTuple):
    """One published form of a row."""

    name: str
    words: str
    columns: tuple[str, ...]  # that it goes by: all of them, or of names with bars between them one
    read: Callable[[Values], list[Values]]  # to rows with our columns; raises BadRow
    fits: Callable[[Values], bool] = lambda row: True  # where other layouts have the same columns


def recognised(row: Values) -> Layout | None:
    """The first layout whose columns the row has."""
    try:
        return _with_layout(row)[1]
    except (BadRow, RecursionError):
        return None


def _with_layout(row: Values) -> tuple[Values, Layout | None]:
    """The row as `cells` has it, and its layout. Where sources are joined, each has the others' columns, all null."""
    everything = cells(row)
    filled = {name: value for name, value in everything.items() if value is not None}
    for values in (filled, everything):
        for layout in LAYOUTS:
            named = all(any(name in values for name in names.split("|")) for names in layout.columns)
            if named and layout.fits(values):
                return values, layout
    return everything, None


def in_our_columns(rows: Iterable[Row]) -> Iterator[Row]:
    """Rows of any layout as rows of ours, several for a ranking; those of no known layout get a reason."""
    unknown: dict[str, str] = {}  # one reason for each column that is missing, with what the first such row has
    for row in rows:
        if row.problem:
            yield row
            continue
        try:
            values, layout = _with_layout(row.values)
            if layout is None:
                missing = next((name for name in ("chosen", "rejected") if name not in values), "prompt")
                there = shown_columns(row.values)
                reason = f"missing column {missing}: there are {there} (--columns takes other names)"
                yield row._replace(problem=unknown.setdefault(missing, reason))
            else:
                yield from (row._replace(values=each) for each in _read(layout, values))
        except BadRow as error:
            yield row._replace(problem=str(error))
        except RecursionError:  # what JSON lines and Parquet let through is as deep as their parsers go
            yield row._replace(problem="nested too deeply")


def shown_columns(row: Values) -> str:
    """Names of the columns of a row, for a message."""
    names = [f"{name:.40}" for name in row][:SHOWN_COLUMNS]
    return ", ".join(names + ["…"] * (len(row) > SHOWN_COLUMNS)) or "none"


def renamed(rows: Iterable[Row], columns: Sequence[str]) -> Iterator[Row]:
    """Rows whose columns are named by `prompt=question` and the like: our name, and theirs (dots lead into objects).

    Raises:
        InputError: none of the first rows has a column of that name, or one of ours is named twice.
    """
    if not columns:
        yield from rows
        return
    names = dict(each.split("=", 1) for each in columns)
    if len(names) < len(columns):
        raise InputError(f"--columns {' '.join(columns)}: names a column twice")
    missing, last, number = set(names.values()), None, 0
    for row in rows:
        if row.problem is None:
            number, last = number + 1, row
            found = {ours: value for ours, path in names.items() if (value := _at(row.values, path)) is not None}
            missing -= {names[ours] for ours in found}
            if missing and number >= ROWS:
                break
            others = {name: value for name, value in row.values.items() if name not in {*names, *names.values()}}
            row = row._replace(values={**others, **found})
        yield row
    if missing and last is not None:
        place = last.location if number == 1 else f"{last.location} and those before it"
        raise InputError(
            f"--columns: no column {', '.join(sorted(missing))} in {place}; there are {shown_columns(last.values)}"
        )


def _at(row: Values, path: str) -> Any:
    """The value of a column, or of a field in it; None without it."""
    if path in row:
        return row[path]
    value: Any = row
    for name in path.split("."):
        try:
            value = value[int(name)] if isinstance(value, list) else value[name]
        except (KeyError, IndexError, TypeError, ValueError):
            return None
    return value


def cells(row: Values) -> Values:
    """A row with the message lists in it as such, whatever the container made of them.

    Its names are as we write them too: a table made by hand may say `Prompt` or `Chosen rating`.
    """
    cells = {name: listed_messages(value) for name, value in row.items()}
    for name, value in list(cells.items()):
        ours = name.strip().lower().replace(" ", "_")
        if cells.get(ours) is None:
            cells[ours] = value
    for name in LISTS:  # of other things than messages
        if name in cells:
            cells[name] = _object(cells[name])
    return cells


def _object(value: Any) -> Any:
    """A list or an object that a table holds as text; another text stays one."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        with contextlib.suppress(ValueError):
            return from_text(value)
    return value


def _read(layout: Layout, row: Values) -> list[Values]:
    if layout.read is _unchanged:
        return [row]
    for names in layout.columns:
        if is_empty(_first(row, names)):
            raise BadRow(f"column {_found(row, names)} is empty")
    try:
        return layout.read(row)
    except BadRow:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # what is in a cell may be anything
        raise BadRow(f"has the columns of {layout.name}, but not its values") from error


def number(value: Any, name: str = "rating") -> float:
    """A finite number, also from text, with a point or a comma before its decimals.

    Raises:
        BadRow: `name` is not one.
    """
    if isinstance(value, str) and DECIMAL_COMMA.fullmatch(value):
        value = value.replace(",", ".")
    try:
        found = math.nan if isinstance(value, bool) else float(value)  # True is no rating, though float takes it
    except (TypeError, ValueError, OverflowError):  # the last one: an integer with more digits than a float has
        found = math.nan
    if not math.isfinite(found):
        raise BadRow(f"{name} is not a number")
    return found


def is_empty(value: Any) -> bool:
    """Whether a cell holds nothing."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))  # NaN: of pandas


def _found(row: Values, names: str) -> str:
    """Which of these names the row has."""
    return next(name for name in names.split("|") if name in row)


def _first(row: Values, names: str) -> Any:
    return next((row[name] for name in names.split("|") if name in row), None)


# --- messages --------------------------------------------------------------------------------------------------------


def _dialogue(text: str) -> Messages:
    """Turns of a transcript that ends with an answer.

    In hh-rlhf a turn may be empty, and one role may have two after each other, which no other transcript is let do.
    """
    if SPOKEN_TURN.match(text):
        _, *parts = SPOKEN_TURN.split(text)
        return [
            {"role": role.lower(), "content": without_end(content).strip()}
            for role, content in zip(parts[::2], parts[1::2], strict=True)
        ]
    if turns := answered_turns(text):
        return turns
    raise BadRow("text is not the transcript of a dialogue")


# --- labels ----------------------------------------------------------------------------------------------------------


def _side_of_sign(row: Values, column: str) -> int:
    """The better one of two: 0 where the number is negative, 1 where it is positive."""
    strength = number(row[column], column)
    if strength == 0:
        raise BadRow("tie")
    return int(strength > 0)


def _side_of_flag(row: Values, column: str) -> int:
    if (flag := number(row[column], column)) not in (0, 1):
        raise BadRow(f"{column} is neither 0 nor 1")
    return int(flag)


def _side_of_name(row: Values, names: str, sides: str = "ab") -> int:
    """The better one of two that are called by the letters, or by the numbers, of `sides`; also `A>B` and `[[A]]`."""
    said = str(_first(row, names)).strip(" []").removesuffix(".0").lower()
    one, other = sides[0], sides[1]
    if said.startswith("tie") or said in ("both", "neither", "equal", "same", "draw", f"{one}={other}"):
        raise BadRow("tie")
    side = re.fullmatch(rf"{SIDE}([{sides}])(?:>+{SIDE}[{sides}])?", said)
    if side is None:
        raise BadRow(f"{_found(row, names)} is neither {one}, {other} nor a tie")
    return sides.index(side[1])


def _pair(row: Values, prompt: Any, answers: Sequence[Any], better: int, authors: Sequence[Any] = (None, None)) -> list:
    sides = {"chosen": better, "rejected": 1 - better}
    named = {f"{side}_author": authors[index] for side, index in sides.items() if authors[index] is not None}
    return [{**row, "prompt": prompt, **{side: answers[index] for side, index in sides.items()}, **named}]


def _ranking(row: Values, prompt: Any, ranked: Iterable[tuple[float, Any, Any]], rated: bool = False) -> list[Values]:
    """Every pair that (score, answer, author) of several answers imply, the higher score the better; ties as pairs too.

    The scores are kept as ratings where they are such, otherwise their difference as the margin: a tie is 0 in it.
    """
    ordered = sorted(ranked, key=lambda answer: -answer[0])
    if len(ordered) < 2:
        raise BadRow("fewer than two ranked answers")
    pairs = []
    for (high, chosen, author), (low, rejected, other) in itertools.combinations(ordered, 2):
        scores = {"chosen_rating": high, "rejected_rating": low} if rated else {"margin": high - low}
        pairs += [{**values, **scores} for values in _pair(row, prompt, (chosen, rejected), 0, (author, other))]
    return pairs


# --- one function a layout -------------------------------------------------------------------------------------------


def _unchanged(row: Values) -> list[Values]:
    return [row]


def _sides(chosen: str, rejected: str) -> Callable[[Values], list[Values]]:
    """Reads a layout that differs from ours in names alone."""
    return lambda row: _pair(row, _first(row, PROMPT), (row[chosen], row[rejected]), 0)


def _asked(row: Values) -> Any:
    """The prompt; as LLaMA-Factory joins them, the `input` of an instruction stands below it."""
    asked, below = _first(row, PROMPT), row.get("input")
    return f"{asked}\n{below}" if _found(row, PROMPT) == "instruction" and isinstance(asked, str) and below else asked


def _alpaca(row: Values) -> list[Values]:
    """`history` has earlier turns, [asked, answered] each."""
    asked = _asked({name: value for name, value in row.items() if name in ("instruction", "input")})
    texts = [text for turn in row.get("history") or [] for text in turn] + [asked]
    turns = [{"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), texts)]
    return _pair(row, turns if len(turns) > 1 else asked, (row["chosen"], row["rejected"]), 0)


def _conversation(row: Values) -> list[Values]:
    asked = _first(row, "conversations|messages|context")
    return _pair(row, asked, (row["chosen"], row["rejected"]), 0)


def _hh(row: Values) -> list[Values]:
    chosen, rejected = (_dialogue(row[side]) for side in ("chosen", "rejected"))
    return _pair(row, chosen[:-1], (chosen, rejected), 0)


def _swift(row: Values) -> list[Values]:
    messages = row["messages"]
    return _pair(row, messages[:-1], (messages[-1:], _first(row, "rejected_response|rejected_messages")), 0)


def _helpsteer2_preference(row: Values) -> list[Values]:
    better = _side_of_sign(row, "preference_strength")
    return _pair(row, row["prompt"], (row["response_1"], row["response_2"]), better)


def _helpsteer3(row: Values) -> list[Values]:
    better = _side_of_sign(row, "overall_preference")
    return _pair(row, row["context"], (row["response1"], row["response2"]), better)


def _pku(row: Values) -> list[Values]:
    better = _side_of_flag(row, "better_response_id")
    return _pair(row, row["prompt"], (row["response_0"], row["response_1"]), better)


def _shp(row: Values) -> list[Values]:
    better = 1 - _side_of_flag(row, "labels")  # 1: A is the better one
    return _pair(row, row["history"], (row["human_ref_A"], row["human_ref_B"]), better)


def _nectar(row: Values) -> list[Values]:
    ranked = [(-number(each["rank"], "rank"), each["answer"], each.get("model")) for each in row["answers"]]
    return _ranking(row, row["prompt"], ranked)


def _nemo(row: Values) -> list[Values]:
    ranked = [(-number(each["rank"], "rank"), each["completion"], None) for each in row["completions"]]
    return _ranking(row, row["context"], ranked)


def _arena(row: Values) -> list[Values]:
    better = _side_of_name(row, "winner")
    dialogues = row["conversation_a"], row["conversation_b"]
    return _pair(row, dialogues[better][:-1], dialogues, better, (row.get("model_a"), row.get("model_b")))


def _vote(row: Values) -> list[Values]:
    """A line of `votes.jsonl`; the pair is ours already, where someone won."""
    if (said := str(row["vote"])) in NOBODY_WON:
        raise BadRow(NOBODY_WON[said])
    if said not in WINNERS:
        raise BadRow("vote is neither left, right nor undecided")
    return [row]


def _lmsys(row: Values) -> list[Values]:
    """Each cell is the list of what one speaker said, written as JSON."""
    if number(row["winner_tie"], "winner_tie"):
        raise BadRow("tie")
    better = _side_of_flag(row, "winner_model_b")
    asked, *answers = (from_text(row[name]) for name in ("prompt", "response_a", "response_b"))
    dialogues = []
    for answered in answers:
        turns = itertools.chain(*zip(asked, answered, strict=True))
        roles = itertools.cycle(("user", "assistant"))
        dialogues.append([{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)])
    return _pair(row, dialogues[better][:-1], dialogues, better, (row.get("model_a"), row.get("model_b")))


def _summaries(row: Values) -> list[Values]:
    better, info, (first, second) = _side_of_flag(row, "choice"), _object(row["info"]), _object(row["summaries"])
    post = info.get("post") or info["article"]
    authors = first.get("policy"), second.get("policy")
    return _pair(row, f"{post}\n\nTL;DR:", (first["text"], second["text"]), better, authors)


def _webgpt(row: Values) -> list[Values]:
    asked = _object(row["question"])
    asked = asked["full_text"] if isinstance(asked, dict) else asked
    answers = [(number(row[f"score_{side}"], "score"), row[f"answer_{side}"], None) for side in (0, 1)]
    return _ranking(row, asked, answers)


def _rated_answers(row: Values) -> list[Values]:
    """Answers without a rating are left aside."""
    answers, ratings = _first(row, "generations|responses"), _first(row, "ratings|rating|scores")
    models = _first(row, "generation_models|models") or [None] * len(answers)
    rated = [
        (number(rating), answer, model)
        for answer, rating, model in zip(answers, ratings, models, strict=True)
        if not is_empty(rating)
    ]
    return _ranking(row, _first(row, PROMPT), rated, rated=True)


def _labelled(row: Values) -> list[Values]:
    names = _found(row, ANSWER_A), _found(row, ANSWER_B)
    sides = "ab" if names[0].endswith("a") else "12"
    better = _side_of_name(row, LABEL, sides)
    authors = [row.get(f"model_{side}") for side in sides]
    return _pair(row, _asked(row), [row[name] for name in names], better, authors)


def _sets(row: Values) -> list[Values]:
    chosen, rejected = row["chosen"], row["rejected"]
    return [pair for texts in itertools.product(chosen, rejected) for pair in _pair(row, row["prompt"], texts, 0)]


def _ultrafeedback(row: Values) -> list[Values]:
    rated = [(number(each["overall_score"]), each["response"], each.get("model")) for each in row["completions"]]
    return _ranking(row, _asked(row), rated, rated=True)


def _attributes(row: Values) -> list[Values]:
    """The score of a raw HelpSteer2 row is the mean of its attributes (0-4, steps of 0.2)."""
    return [{**row, "score": sum(number(row[name]) for name in ATTRIBUTES) / len(ATTRIBUTES)}]


def _scored(row: Values) -> list[Values]:
    score = _first(row, SCORE)
    answer = {"response": _first(row, "response|completion|answer|output")}
    rating = float(score) if isinstance(score, bool) else number(score)  # TRL's unpaired preferences: desirable or not
    return [{**row, **answer, "prompt": _asked(row), "score": rating}]


LAYOUTS = (
    Layout(
        "votes",
        "a pair that somebody voted on, or could not decide",
        ("prompt", "chosen", "rejected", "vote", "voter"),
        _vote,
    ),
    Layout(
        "RewardBench 2",
        "a list of answers a side, every pair of them",
        ("prompt", "chosen", "rejected"),
        _sets,
        lambda row: all(
            isinstance(row[side], list) and row[side] and all(isinstance(text, str) for text in row[side])
            for side in ("chosen", "rejected")
        ),
    ),
    Layout("TRL, explicit prompt", "a prompt and two answers", ("prompt", "chosen", "rejected"), _unchanged),
    Layout(
        "LLaMA-Factory alpaca",
        "an instruction, its input, two answers",
        ("instruction", "chosen", "rejected"),
        _alpaca,
    ),
    Layout("ColossalChat", "turns and two answers", ("context", "chosen", "rejected"), _conversation),
    Layout(
        "LLaMA-Factory sharegpt",
        "turns, and two answers as one message each",
        ("conversations|messages", "chosen", "rejected"),
        _conversation,
        lambda row: isinstance(row["chosen"], list) and len(row["chosen"]) == 1,
    ),
    Layout(
        "Orca",
        "a question and two answers",
        ("question|input|query", "chosen", "rejected"),
        _sides("chosen", "rejected"),
    ),
    Layout(
        "hh-rlhf",
        "a dialogue in one string a side",
        ("chosen", "rejected"),
        _hh,
        lambda row: (
            isinstance(row["chosen"], str) and bool(SPOKEN_TURN.match(row["chosen"]) or answered_turns(row["chosen"]))
        ),
    ),
    Layout(
        "TRL, implicit prompt",
        "a message list a side",
        ("chosen", "rejected"),
        _unchanged,
        lambda row: isinstance(row["chosen"], list),
    ),
    Layout(
        "ms-swift", "a conversation and a worse answer", ("messages", "rejected_response|rejected_messages"), _swift
    ),
    Layout("pos and neg", "a prompt and two answers", (PROMPT, "pos", "neg"), _sides("pos", "neg")),
    Layout(
        "UltraFeedback of Argilla",
        "a prompt and two answers",
        (PROMPT, "chosen_response", "rejected_response"),
        _sides("chosen_response", "rejected_response"),
    ),
    Layout(
        "HelpSteer2-preference",
        "two answers, below 0 where the first is better",
        ("prompt", "response_1", "response_2", "preference_strength"),
        _helpsteer2_preference,
    ),
    Layout(
        "HelpSteer3",
        "two answers, below 0 where the first is better",
        ("context", "response1", "response2", "overall_preference"),
        _helpsteer3,
    ),
    Layout(
        "PKU-SafeRLHF",
        "two answers and the number of the better one",
        ("prompt", "response_0", "response_1", "better_response_id"),
        _pku,
    ),
    Layout("SHP", "two answers, 1 where A is better", ("history", "human_ref_A", "human_ref_B", "labels"), _shp),
    Layout(
        "Nectar",
        "answers with ranks, every pair of them",
        ("prompt", "answers"),
        _nectar,
        lambda row: isinstance(row["answers"], list),
    ),
    Layout("NeMo-RL", "completions with ranks, every pair of them", ("context", "completions"), _nemo),
    Layout(
        "UltraFeedback",
        "completions with an overall score, every pair of them",
        (PROMPT, "completions"),
        _ultrafeedback,
        lambda row: isinstance(row["completions"], list),
    ),
    Layout(
        "Arena of LMSYS on Kaggle",
        "a list of texts a speaker, and flags for the winner",
        ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b", "winner_tie"),
        _lmsys,
    ),
    Layout(
        "Stack Exchange, paired",
        "a question, a better and a worse answer",
        ("question", "response_j", "response_k"),
        _sides("response_j", "response_k"),
    ),
    Layout(
        "OpenAI summaries",
        "two summaries of a post, 0 or 1 for the better one",
        ("info", "summaries", "choice"),
        _summaries,
    ),
    Layout(
        "WebGPT comparisons",
        "two answers with a score each",
        ("question", "answer_0", "answer_1", "score_0", "score_1"),
        _webgpt,
    ),
    Layout("Chatbot Arena", "two dialogues and a winner", ("conversation_a", "conversation_b", "winner"), _arena),
    Layout(
        "Distilabel",
        "answers with ratings, every pair of them",
        (PROMPT, "generations|responses", "ratings|rating|scores"),
        _rated_answers,
    ),
    Layout(
        "labelled answers",
        "two answers, and a or b (1 or 2) for the better one",
        (PROMPT, ANSWER_A, ANSWER_B, LABEL),
        _labelled,
    ),
    Layout(
        "HelpSteer2",
        "an answer and five attributes, every pair of a prompt's answers",
        ("prompt", "response", *ATTRIBUTES),
        _attributes,
    ),
    Layout(
        "scored answers",
        "an answer and its score, every pair of a prompt's answers",
        (PROMPT, "response|completion|answer|output", SCORE),
        _scored,
    ),
)
