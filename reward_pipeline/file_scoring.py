"""The rows of a source get their rewards, in a JSONL file."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from reward_pipeline.conversations import Messages, Response, response_text, turns_before_answer
from reward_pipeline.evaluator import RewardModelEvaluator, check_templates
from reward_pipeline.files import InputError, replace_file, sole_writer
from reward_pipeline.layouts import cells, in_our_columns, recognised, renamed
from reward_pipeline.schemas import in_turns
from reward_pipeline.sources import BadRow, Row, Source, open_source

CHUNK = 1024  # rows in memory at once
NEEDED = "prompt, and response, responses, or chosen and rejected, or be in a published layout"

Values = dict[str, Any]


def score_file(
    evaluator: RewardModelEvaluator,
    source: Source,
    target: Path,
    split: str | None = None,
    columns: Sequence[str] = (),
) -> int:
    """Score every row of a source into a JSONL file, which appears only when it is complete; returns the rows.

    A row holds a `prompt`, and `response`, `responses`, or `chosen` and `rejected`; `reward`, `rewards`, or
    `chosen_reward` and `rejected_reward` are added to it. Rows of another published layout get our columns first, and
    of a ranking every pair becomes a row.

    Args:
        source: read twice: it is opened again by its name.
        split: that it was opened with.
        columns: names of columns, as `layouts.renamed` takes them.

    Raises:
        InputError: names the first row that can not be scored, and nothing is written; another run writes there.
    """
    rows = answers = 0
    # A first pass: a bad row is found before the work is done.
    for chunk in chunks(tqdm(checked_rows(renamed(source.rows, columns)), desc="Checking", unit=" rows")):
        contexts = [(context, place) for place, row in chunk for context in row_contexts(row)]
        check_templates(evaluator, [context for context, _ in contexts], [place for _, place in contexts])
        rows += len(chunk)
        answers += sum(len(row_answers(row)) for _, row in chunk)
    if not rows:
        raise InputError(f"{source.name}: has no rows")
    bar = tqdm(total=answers * len(evaluator.members), desc="Scoring", unit=" answers")
    with sole_writer(target, target.with_name(f".{target.name}.lock")), replace_file(target) as file, bar:
        for chunk in chunks(
            checked_rows(renamed(open_source(source.name, split, revision=source.revision).rows, columns))
        ):
            read = [in_turns(row) for _, row in chunk]
            flat = [(row["prompt"], answer) for row in read for answer in row_answers(row).values()]
            prompts, responses = [prompt for prompt, _ in flat], [answer for _, answer in flat]
            scores = iter(evaluator.get_reward_scores(prompts, responses, progress=bar.update))
            for _, row in chunk:
                rewards = list(itertools.islice(scores, len(row_answers(row))))
                # What Parquet has and JSON has not, such as dates, as text.
                file.write(json.dumps(with_rewards(row, rewards), ensure_ascii=False, default=str) + "\n")
    return rows


def chunks(rows: Iterable[tuple[str, Values]]) -> Iterator[list[tuple[str, Values]]]:
    """Rows in lists of at most `CHUNK`."""
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, CHUNK)):
        yield chunk


def checked_rows(rows: Iterable[Row]) -> Iterator[tuple[str, Values]]:
    """Places and values of rows that can be scored.

    Raises:
        InputError: names the first row that can not, and what is wrong with it.
    """
    for given in rows:
        for row in _our_rows(given):
            if row.problem:
                raise InputError(f"{row.location}: {row.problem}")
            check_row(row.location, row.values)
            yield row.location, row.values


def _our_rows(row: Row) -> Iterable[Row]:
    """A row in our columns; answers to a prompt as they stand, also where ratings would make pairs of them."""
    if row.problem:
        return [row]
    try:
        values = cells(row.values)
    except BadRow as error:
        return [row._replace(problem=str(error))]
    answers = "prompt" in values and {"response", "responses"} & values.keys() and "chosen" not in values
    if answers or recognised(values) is None:  # what is missing in other rows is said for this script's columns
        return [row._replace(values=values)]
    return (each._replace(values={**row.values, **each.values}) for each in in_our_columns([row]))


def check_row(place: str, row: Values) -> None:
    """Make sure that a row can be scored.

    Raises:
        InputError: names the row and what is missing in it.
    """
    try:
        row_contexts(row)
        empty = [name for name, answer in row_answers(row).items() if not response_text(answer).strip()]
    except RecursionError as error:
        raise InputError(f"{place}: nested too deeply") from error
    except KeyError as error:
        there = ", ".join(str(name) for name, value in row.items() if value is not None)
        raise InputError(f"{place}: needs {NEEDED}, but has {there or 'nothing'}") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{place}: {error}") from error
    if empty:
        raise InputError(f"{place}: {empty[0]} is empty, and a reward for no answer means nothing; leave it out")


def row_answers(row: Values) -> dict[str, Response]:
    """The answers of a row by the names of their places. A table has columns that are empty in some rows.

    Raises:
        KeyError: there are none.
        TypeError: `responses` is not a list.
    """
    there = {name: value for name, value in row.items() if value is not None}
    if "chosen" in there:
        return {side: there[side] for side in ("chosen", "rejected")}
    if "responses" not in there:
        return {"response": there["response"]}
    if not isinstance(there["responses"], list):
        raise TypeError("responses is not a list")
    return {f"responses[{number}]": answer for number, answer in enumerate(there["responses"])}


def row_contexts(row: Values) -> list[Messages]:
    """The turns of the prompt, and those before each answer where a message list has more of them.

    Raises:
        KeyError, TypeError, ValueError: as `in_turns`, `row_answers` and `turns_before_answer`.
    """
    row = in_turns(row)
    contexts = [turns_before_answer(row["prompt"], answer) for answer in row_answers(row).values()]
    return [row["prompt"], *(context for context in contexts if context != row["prompt"])]


def with_rewards(row: Values, rewards: list[float]) -> Values:
    """The row and its rewards, named after the columns that they belong to."""
    names = row_answers(row)
    if "chosen" in names:
        return {**row, "chosen_reward": rewards[0], "rejected_reward": rewards[1]}
    return {**row, "reward": rewards[0]} if "response" in names else {**row, "rewards": rewards}
