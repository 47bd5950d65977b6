"""The lines of a JSONL file get their rewards."""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from reward_pipeline.conversations import Messages, Response, parse_prompt, turns_before_answer
from reward_pipeline.evaluator import RewardModelEvaluator, check_templates
from reward_pipeline.files import InputError, first_line, replace_file

LINES = 1024  # lines in memory at once
NEEDED = "prompt, and response, responses, or chosen and rejected"


def score_file(evaluator: RewardModelEvaluator, source: Path, target: Path) -> int:
    """Score every line of a JSONL file into another one, which appears only when it is complete; returns the lines.

    A line holds a `prompt`, and `response`, `responses`, or `chosen` and `rejected`; `reward`, `rewards`, or
    `chosen_reward` and `rejected_reward` are added to it.

    Raises:
        InputError: names the first line that can not be scored, and nothing is written.
    """
    lines, rows, answers = read_lines(source), 0, 0
    while chunk := list(itertools.islice(lines, LINES)):  # a first pass: a bad row is found before the work is done
        contexts = [(context, place) for place, row in chunk for context in row_contexts(row)]
        check_templates(evaluator, [context for context, _ in contexts], [place for _, place in contexts])
        rows += len(chunk)
        answers += sum(len(row_answers(row)) for _, row in chunk)
    if not rows:
        raise InputError(f"{source}: the file is empty")
    total = answers * len(evaluator.members)
    with replace_file(target) as file, tqdm(total=total, desc="Scoring", unit=" answers") as bar:
        lines = read_lines(source)
        while chunk := list(itertools.islice(lines, LINES)):
            flat = [(row["prompt"], answer) for _, row in chunk for answer in row_answers(row)]
            prompts, responses = [prompt for prompt, _ in flat], [answer for _, answer in flat]
            scores = iter(evaluator.get_reward_scores(prompts, responses, progress=bar.update))
            for _, row in chunk:
                rewards = list(itertools.islice(scores, len(row_answers(row))))
                file.write(json.dumps(with_rewards(row, rewards), ensure_ascii=False) + "\n")
    return rows


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Places and checked rows of a file, for `score_file`."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield (place := f"{path} row {number}"), check_line(place, line)
    except OSError as error:
        raise InputError(f"{path}: can not be read ({first_line(error)})") from error


def check_line(place: str, line: bytes) -> dict[str, Any]:
    """Parse one line of UTF-8 text.

    Raises:
        InputError: names the row and what is missing in it.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))
        row_contexts(row)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: not valid JSON ({error.msg}); one object a line is expected") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not UTF-8 text; convert the file first") from error
    except RecursionError as error:
        raise InputError(f"{place}: nested too deeply; needs {NEEDED}") from error
    except ValueError as error:
        raise InputError(f"{place}: {error}") from error
    except (KeyError, TypeError) as error:
        raise InputError(f"{place}: needs {NEEDED} ({type(error).__name__}: {error})") from error
    return row


def row_answers(row: dict[str, Any]) -> Sequence[Response]:
    """The answers of a row, whichever columns hold them."""
    if "responses" in row:
        if not isinstance(row["responses"], list):
            raise TypeError("responses is not a list")
        return row["responses"]
    return [row["response"]] if "response" in row else [row["chosen"], row["rejected"]]


def row_contexts(row: dict[str, Any]) -> list[Messages]:
    """The turns of the prompt, and those before each answer where a message list has more of them.

    Raises:
        KeyError, TypeError, ValueError: as `row_answers` and `turns_before_answer`.
    """
    messages = parse_prompt(row["prompt"])
    contexts = [turns_before_answer(row["prompt"], answer) for answer in row_answers(row)]
    return [messages, *(context for context in contexts if context != messages)]


def with_rewards(row: dict[str, Any], rewards: list[float]) -> dict[str, Any]:
    """The row and its rewards, named after the columns that they belong to."""
    if "responses" in row:
        return {**row, "rewards": rewards}
    if "response" in row:
        return {**row, "reward": rewards[0]}
    return {**row, "chosen_reward": rewards[0], "rejected_reward": rewards[1]}
