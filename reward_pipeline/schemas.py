"""Rows with our columns are checked and become pairs: TRL's conversational preference format with explicit prompt.

{
    "prompt": [{"role": "user", "content": "Name a colour."}],
    "chosen": [{"role": "assistant", "content": "Red."}],
    "rejected": [{"role": "assistant", "content": "Seven."}],
    "chosen_rating": 3.2, "rejected_rating": 0.4, "category": "", "chosen_author": "", "rejected_author": "",
}
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from reward_pipeline.conversations import Messages, parse_prompt, response_text, stripped_turns
from reward_pipeline.layouts import ATTRIBUTES, in_our_columns, number
from reward_pipeline.settings import readable_text
from reward_pipeline.sources import BadRow, Row

RATING_COLUMNS = {"chosen": ("chosen_rating", "chosen_score"), "rejected": ("rejected_rating", "rejected_score")}
CATEGORY_COLUMNS = ("category", "subset", "domain")  # names under which sources tell what kind of prompt a pair has
AUTHOR_COLUMNS = {side: (f"{side}_author", f"{side}_model", f"{side}-model") for side in ("chosen", "rejected")}


def join_raw_rows(rows: Iterable[Row]) -> Iterator[Row]:
    """Binarise raw HelpSteer2 rows; rows that are pairs already pass unchanged.

    Two consecutive rows with one prompt become a pair, rated by the mean of the five attributes (0-4, steps of 0.2);
    the better one is the chosen one. (HelpSteer2, arXiv 2406.08673, rates two answers to each prompt.)
    """
    waiting = None
    for row in rows:
        if row.problem is None and "response" in row.values and "chosen" not in row.values:
            if waiting is None:
                waiting = row
            elif _same_prompt(waiting, row):
                yield _raw_pair(waiting, row)
                waiting = None
            else:
                yield waiting._replace(problem="no second response to the prompt")
                waiting = row
        else:
            yield row
    if waiting is not None:
        yield waiting._replace(problem="no second response to the prompt")


def _same_prompt(first: Row, second: Row) -> bool:
    try:
        return first.values.get("prompt") == second.values.get("prompt")
    except RecursionError:  # lists in lists in lists, which compare level by level
        return False


def _raw_pair(first: Row, second: Row) -> Row:
    try:
        rated = [
            (sum(number(row.values.get(name)) for name in ATTRIBUTES) / len(ATTRIBUTES), row) for row in (first, second)
        ]
    except BadRow as error:
        return first._replace(problem=str(error))
    rated.sort(key=lambda item: item[0], reverse=True)
    (chosen_rating, chosen), (rejected_rating, rejected) = rated
    return Row(
        first.location,
        {
            "prompt": first.values.get("prompt"),
            "chosen": chosen.values["response"],
            "rejected": rejected.values["response"],
            "chosen_rating": chosen_rating,
            "rejected_rating": rejected_rating,
            "category": category_of(first.values),
        },
    )


def check_pair(row: dict[str, Any]) -> dict[str, Any]:
    """One row in any published schema becomes a pair in ours.

    Returns:
        `prompt` (messages, the last one the user's), `chosen`, `rejected` (one assistant message each),
        `chosen_rating`, `rejected_rating` (both floats, or both None), `category` (empty where unknown),
        `chosen_author`, `rejected_author` (who wrote the answers, such as models; both empty unless both are known).

    Raises:
        BadRow: the row is unusable; the message says why.
    """
    for column in ("chosen", "rejected"):
        if column not in row:
            raise BadRow(f"missing column {column}")
        if row[column] is None:
            raise BadRow("null")
    if "prompt" not in row and not isinstance(row["chosen"], list):
        raise BadRow("missing column prompt")
    prompt = row["prompt"] if "prompt" in row else row["chosen"][:-1]
    if prompt is None:
        raise BadRow("null")
    try:
        messages = _unpacked(prompt)
    except (TypeError, ValueError) as error:
        raise BadRow("prompt is not a conversation that ends with a user turn") from error
    if not messages[-1]["content"].strip():
        raise BadRow("empty prompt")
    chosen, rejected = (_checked_response(messages, row[side]) for side in ("chosen", "rejected"))
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


def _checked_response(messages: Messages, completion: Any) -> str:
    try:
        text = response_text(completion)
        context = completion[:-1] if isinstance(completion, list) else []
        # A list may repeat the prompt (HelpSteer2_binarized does); an answer to another one is a mistake in the source.
        agrees = not context or stripped_turns(_unpacked(context)) == stripped_turns(messages)
    except (TypeError, ValueError) as error:
        raise BadRow("response is not a text or message list") from error
    if not text.strip():
        raise BadRow("empty response")
    if not agrees:
        raise BadRow("response repeats another prompt")
    return text


def _unpacked(prompt: str | list[dict[str, str]]) -> Messages:
    """Turns of a prompt; HelpSteer2_binarized packs whole dialogues, markers included, into one user message."""
    messages = parse_prompt(prompt)
    return parse_prompt(messages[0]["content"]) if len(messages) == 1 else messages


def _rating(row: dict[str, Any], side: str) -> float | None:
    values = [row[name] for name in RATING_COLUMNS[side] if row.get(name) not in (None, "")]
    return number(values[0]) if values else None


def _check_margin(margin: Any) -> None:
    """By how much the chosen one is better; of other scales than ratings, so its sign alone is read."""
    if margin not in (None, "") and (difference := number(margin, "margin")) <= 0:
        raise BadRow("margin says the rejected is better" if difference else "tie")


def category_of(row: dict[str, Any]) -> str:
    """What the row's category column says; empty without one."""
    return _label(row, CATEGORY_COLUMNS)


def _label(row: dict[str, Any], columns: Sequence[str]) -> str:
    values = [row[column] for column in columns if row.get(column) not in (None, "")]
    if not values or isinstance(values[0], list | dict) or values[0] != values[0]:  # NaN: an empty cell
        return ""
    return readable_text(str(values[0]))
