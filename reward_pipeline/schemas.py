"""Rows with our columns are checked and become pairs: TRL's conversational preference format with explicit prompt.

{
    "prompt": [{"role": "user", "content": "Name a colour."}],
    "chosen": [{"role": "assistant", "content": "Red."}],
    "rejected": [{"role": "assistant", "content": "Seven."}],
    "chosen_rating": 3.2, "rejected_rating": 0.4, "category": "", "chosen_author": "", "rejected_author": "",
}
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from reward_pipeline.conversations import (
    Messages,
    OtherPrompt,
    parse_prompt,
    response_text,
    stripped_turns,
    turns_before_answer,
)
from reward_pipeline.layouts import in_our_columns, is_empty, number
from reward_pipeline.settings import readable_text
from reward_pipeline.sources import BadRow, Row
from reward_pipeline.transcripts import read_transcripts


def _spelled(*names: str) -> tuple[str, ...]:
    """Names of columns, with underscores and with hyphens."""
    return tuple(dict.fromkeys(each for name in names for each in (name, name.replace("_", "-"))))


# Names under which sources have what a pair may have besides its texts, the first ones first.
RATINGS = ("{}_rating", "{}_score", "rating_{}", "score_{}", "{}_avg_rating")
RATING_COLUMNS = {side: _spelled(*(name.format(side) for name in RATINGS)) for side in ("chosen", "rejected")}
AUTHOR_COLUMNS = {side: _spelled(f"{side}_author", f"{side}_model") for side in ("chosen", "rejected")}
SYSTEM_COLUMNS = _spelled("system", "system_prompt", "system_message")
NO_NUMBER = ("nan", "none", "null")  # as tables write a cell without a rating
CATEGORY_COLUMNS = ("category", "subset", "domain")


def join_raw_rows(rows: Iterable[Row]) -> Iterator[Row]:
    """Binarise rows with one answer and its score each; rows that are pairs already pass unchanged.

    Answers to one prompt, under one system prompt, become every pair that their scores imply, wherever the rows stand:
    two of them are one pair, as in the binarised HelpSteer2 (arXiv 2406.08673), k of them k (k - 1) / 2, as in
    InstructGPT (arXiv 2203.02155). Earlier answers wait in a temporary file, so they may be more than memory holds.
    """
    answers = None
    for row in rows:
        if row.problem or "response" not in row.values or "chosen" in row.values:
            yield row
            continue
        if answers is None:
            answers = sqlite3.connect("", check_same_thread=False)  # without a name: on the disk, gone when closed
            answers.execute("CREATE TABLE answers (prompt BLOB, answer TEXT)")
            answers.execute("CREATE INDEX prompts ON answers (prompt)")
        try:
            prompt, answer = _raw_answer(row)
        except BadRow as error:
            yield row._replace(problem=str(error))
            continue
        except RecursionError:  # lists in lists in lists
            yield row._replace(problem="nested too deeply")
            continue
        earlier = answers.execute("SELECT answer FROM answers WHERE prompt = ? ORDER BY rowid", (prompt,))
        for (other,) in earlier.fetchall():
            pair = [json.loads(other), json.loads(answer)]
            better, worse = sorted(pair, key=lambda each: -each["score"])
            yield Row(pair[0]["place"], _raw_pair(row.values, better, worse))
        answers.execute("INSERT INTO answers VALUES (?, ?)", (prompt, answer))
    if answers:
        alone = answers.execute("SELECT MIN(answer) FROM answers GROUP BY prompt HAVING COUNT(*) = 1 ORDER BY rowid")
        yield from (Row(json.loads(answer)["place"], {}, "no second response to the prompt") for (answer,) in alone)
        answers.close()


def _raw_answer(row: Row) -> tuple[bytes, str]:
    """Hash of the prompt, and what a pair needs of the answer to it, as JSON."""
    values = row.values
    turns = stripped_turns(_with_system(_checked_prompt(values.get("prompt")), values))
    answer = {
        "place": row.location,
        "score": number(values.get("score")),
        "response": values["response"],
        "author": _label(values, ("author", "model")),
        "category": category_of(values),
    }
    return hashlib.blake2b(json.dumps(turns).encode(), digest_size=16).digest(), json.dumps(answer, default=str)


def _raw_pair(row: dict[str, Any], better: dict[str, Any], worse: dict[str, Any]) -> dict[str, Any]:
    return {
        **{name: row[name] for name in ("prompt", *SYSTEM_COLUMNS) if name in row},
        **{"chosen": better["response"], "rejected": worse["response"]},
        **{"chosen_rating": better["score"], "rejected_rating": worse["score"]},
        **{"chosen_author": better["author"], "rejected_author": worse["author"]},
        "category": better["category"] or worse["category"],
    }


def check_pair(row: dict[str, Any]) -> dict[str, Any]:
    """One row in any published schema becomes a pair in ours.

    Returns:
        `prompt` (messages, the last one the user's or a tool's), `chosen`, `rejected` (one assistant message each),
        `chosen_rating`, `rejected_rating` (both floats, or both None), `category` (empty where unknown),
        `chosen_author`, `rejected_author` (who wrote the answers, such as models; both empty unless both are known).

    Raises:
        BadRow: the row is unusable; the message says why.
    """
    for column in ("chosen", "rejected"):
        if column not in row:
            raise BadRow(f"missing column {column}")
        if _is_null(row[column]):
            raise BadRow("null")
    if "prompt" not in row and not isinstance(row["chosen"], list):
        raise BadRow("missing column prompt")
    row = in_turns(row)
    messages, others = (_context(row["prompt"], row, side) for side in ("chosen", "rejected"))
    if stripped_turns(messages) != stripped_turns(others):
        raise BadRow("chosen and rejected answer different turns")
    if not messages[-1]["content"].strip():
        raise BadRow("empty prompt")
    chosen, rejected = (response_text(row[side]) for side in ("chosen", "rejected"))
    if not (chosen.strip() and rejected.strip()):
        raise BadRow("empty response")
    if chosen.strip() == rejected.strip():  # the white space around an answer is trimmed when it is tokenised
        raise BadRow("chosen equals rejected")
    chosen_rating, rejected_rating = (_rating(row, side) for side in ("chosen", "rejected"))
    if chosen_rating is None or rejected_rating is None:
        chosen_rating = rejected_rating = None
    elif chosen_rating == rejected_rating:
        raise BadRow("tied ratings")
    elif chosen_rating < rejected_rating:
        raise BadRow("rating says the rejected is better")
    _check_margin(row.get("margin"))
    chosen_author, rejected_author = (_label(row, AUTHOR_COLUMNS[side]) for side in ("chosen", "rejected"))
    if not (chosen_author and rejected_author):
        chosen_author = rejected_author = ""
    return {
        "prompt": messages,
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "chosen_rating": chosen_rating,
        "rejected_rating": rejected_rating,
        "category": category_of(row),
        "chosen_author": chosen_author,
        "rejected_author": rejected_author,
    }


def checked_pairs(rows: Iterable[Row]) -> Iterator[tuple[Row, dict[str, Any] | None, str | None]]:
    """Rows of any schema, each with the pair that it holds, or with the reason why it holds none."""
    for row in join_raw_rows(in_our_columns(rows)):
        try:
            yield row, None if row.problem else check_pair(row.values), row.problem
        except BadRow as error:
            yield row, None, str(error)
        except RecursionError:  # what JSON lines and Parquet let through is as deep as their parsers go
            yield row, None, "nested too deeply"


def _is_null(value: Any) -> bool:
    return is_empty(value) and value != ""  # an empty text has a reason of its own


def in_turns(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its prompt as messages: transcripts are read, the system column is a turn, a number is its digits.

    Without a prompt it is what stands before the chosen answer in its message list.

    Raises:
        BadRow: the prompt is no conversation that can be answered.
        KeyError: there is none.
    """
    row = read_transcripts({name: str(value) if _is_number(name, value) else value for name, value in row.items()})
    implicit = "prompt" not in row and isinstance(row["chosen"], list)
    return {**row, "prompt": _with_system(_checked_prompt(row["chosen"][:-1] if implicit else row["prompt"]), row)}


def _is_number(name: str, value: Any) -> bool:
    """Whether a text came as a number: `datasets` keeps "2" as JSON where a column has messages too."""
    texts = ("prompt", "chosen", "rejected", "response")
    return name in texts and isinstance(value, int | float) and not isinstance(value, bool) and not is_empty(value)


def _checked_prompt(prompt: Any) -> Messages:
    if _is_null(prompt):
        raise BadRow("null")
    try:
        return parse_prompt(prompt)
    except (TypeError, ValueError) as error:
        raise BadRow(str(error)) from error


def _with_system(messages: Messages, row: dict[str, Any]) -> Messages:
    """The prompt with what the row has in a column for it as the system turn, unless it has one already."""
    system = next((row[name] for name in SYSTEM_COLUMNS if not is_empty(row.get(name))), "")
    if not isinstance(system, str):
        raise BadRow("system is not a text")
    if not system.strip() or any(message["role"] == "system" for message in messages):
        return messages
    return parse_prompt([{"role": "system", "content": system}, *messages])


def _context(prompt: Messages, row: dict[str, Any], side: str) -> Messages:
    try:
        return turns_before_answer(prompt, row[side])
    except OtherPrompt as error:
        raise BadRow(f"{side} answers another prompt than that of the row") from error
    except (TypeError, ValueError) as error:
        raise BadRow(str(error)) from error


def _rating(row: dict[str, Any], side: str) -> float | None:
    values = [value for value in _values(row, RATING_COLUMNS[side]) if str(value).lower() not in NO_NUMBER]
    return number(values[0]) if values else None


def _values(row: dict[str, Any], columns: Sequence[str]) -> list[Any]:
    """What the row has under these names, as far as it is not empty."""
    return [row[name] for name in columns if row.get(name) not in (None, "")]


def _check_margin(margin: Any) -> None:
    """By how much the chosen one is better; of other scales than ratings, so its sign alone is read."""
    if not is_empty(margin) and (difference := number(margin, "margin")) <= 0:
        raise BadRow("margin says the rejected is better" if difference else "tie")


def category_of(row: dict[str, Any]) -> str:
    """What the row's category column says; empty without one."""
    return _label(row, CATEGORY_COLUMNS)


def _label(row: dict[str, Any], columns: Sequence[str]) -> str:
    values = _values(row, columns)
    if not values or isinstance(values[0], list | dict) or values[0] != values[0]:  # NaN: an empty cell
        return ""
    return readable_text(str(values[0]))
