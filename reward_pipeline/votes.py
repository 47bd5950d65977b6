"""What people voted between two answers: one JSON line a vote, each a pair in our schema, and what the votes say.

    append_vote("votes.jsonl", vote_row(duel, "left", "Ada"))
    load_helpsteer_dataset.py --source votes.jsonl

A vote is on the disk before `append_vote` returns; neither a second process nor a `kill -9` nor a full disk loses one
that was there. Rows in which nobody won have the margin 0, and are counted by their reason where pairs are read.
"""

import contextlib
import datetime
import errno
import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from reward_pipeline.conversations import Messages, first_refused, parse_prompt
from reward_pipeline.files import InputError, first_line
from reward_pipeline.form import form_differences, form_margins, response_length
from reward_pipeline.layouts import NOBODY_WON, WINNERS
from reward_pipeline.pairs import prompt_key
from reward_pipeline.statistics import rate_interval, wins

SIDES = WINNERS  # of the page
CHOICES = (*SIDES, *NOBODY_WON)
OPINIONS = ("judge", "form", "longer")  # that votes are compared with
DIRECTORY_FSYNC = os.name == "posix"  # elsewhere a directory can not be opened, and its entries need no flush


class Duel(NamedTuple):
    """Two answers to one prompt, as they stand on the page, and who gave them."""

    prompt: Messages
    left: str
    right: str
    left_model: str
    right_model: str
    category: str = ""


def vote_row(duel: Duel, choice: str, voter: str) -> dict[str, Any]:
    """A vote as a pair: the answer that won is `chosen`.

    Where none did, `chosen` is the left one, and `margin` 0 tells readers of pairs to leave the row out.

    Raises:
        InputError: `choice` is none of `CHOICES`.
    """
    if choice not in CHOICES:
        raise InputError(f"{choice!r} is no vote; one of {', '.join(CHOICES)} is")
    chosen, rejected = SIDES[::-1] if choice == "right" else SIDES
    texts = {"left": duel.left, "right": duel.right}
    models = {"left": duel.left_model, "right": duel.right_model}
    return {
        "prompt": duel.prompt,
        "chosen": [{"role": "assistant", "content": texts[chosen]}],
        "rejected": [{"role": "assistant", "content": texts[rejected]}],
        "margin": int(choice in SIDES),
        "category": duel.category,
        "chosen_author": models[chosen],
        "rejected_author": models[rejected],
        "chosen_position": chosen,
        "rejected_position": rejected,
        "vote": choice,
        "voter": voter,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "vote_id": uuid.uuid4().hex,
    }


def append_vote(path: str | Path, row: Mapping[str, Any]) -> None:
    """Append one vote to a file and wait until it is on the disk.

    Raises:
        InputError: it could not be written; the file is as it was.
    """
    path = Path(path).resolve()  # a link and what it leads to have one lock
    line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without a buffer: what it still held after a failure would follow when the file is closed.
        with FileLock(lock_file(path)), path.open("ab+", buffering=0) as file:
            if not (size := file.seek(0, os.SEEK_END)):
                _flush_directory(path.parent)
            else:
                file.seek(-1, os.SEEK_END)
                # Of a process that was killed while it wrote, or of an editor: the new vote must not hang on to it.
                line = line if file.read(1) == b"\n" else b"\n" + line
            try:
                if file.write(line) < len(line):  # as much as the disk had room for
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), size)
                raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room" if full else "see who may write there, or name another file by --votes"
        raise InputError(f"{path}: the vote was not saved ({first_line(error)}); {remedy}, then vote again") from error


def _flush_directory(directory: Path) -> None:
    """The name of a new file is on the disk only with its directory; not every file system lets one ask for that."""
    if not DIRECTORY_FSYNC:
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def lock_file(path: Path) -> Path:
    """What stands for the right to write a file of votes, and what is counted of it."""
    return path.with_name(f".{path.name}.lock")


def read_votes(path: str | Path) -> tuple[list[dict[str, Any]], int]:
    """All votes of a file, none where it does not exist, and how many lines hold none.

    Raises:
        InputError: it can not be read.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise InputError(f"{path}: can not be read ({first_line(error)}); name another file of votes") from error
    votes = [vote for line in lines if (vote := _as_vote(line))]
    return votes, sum(bool(line.strip()) for line in lines) - len(votes)


def _as_vote(line: bytes) -> dict[str, Any] | None:
    """A line that people may have edited, as a vote; None where it is none."""
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # fails at half a character, which no file takes
        texts = [row["voter"], row["chosen_author"], row["rejected_author"]]
        texts += [answer_text(row, side) for side in ("chosen", "rejected")]
        asked = parse_prompt(row["prompt"]) == row["prompt"]
        whole = row["vote"] in CHOICES and row["chosen_position"] in SIDES and all(text.strip() for text in texts)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return None
    return row if whole and asked else None


def answer_text(vote: Mapping[str, Any], side: str) -> str:
    """Text of the `chosen` or the `rejected` answer."""
    return vote[side][0]["content"]


# --- what the votes say ----------------------------------------------------------------------------------------------


def results(
    votes: Sequence[Mapping[str, Any]],
    form_model: Mapping[str, float] | None = None,
    judged: Sequence[float] | np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """A row for each pair of models and each voter, and one for all voters together where they are several.

    Args:
        votes: N, of `read_votes`.
        form_model: weights of `form.fit_form_model`.
        judged: (N,) by how much the judge prefers the chosen answer to the rejected one; NaN where it has not said.

    Returns:
        `model` and `other` (in alphabetical order), `voter` (None for all), `votes`, `wins` and `losses` of `model`,
        `tie`, `both_bad`, `skip`; `win_rate` of `model` over all but the skipped ones, of which those that nobody won
        count half; `left_rate`, the share of the left answers among those that won; and how often the judge, the form
        model and "longer wins" agree with the votes that someone won: `judge`, `form`, `longer`, with the number of
        votes that they spoke to as `judge_n` and so on. Shares have 95 % intervals over prompts, `…_interval`; they are
        None without any vote to count.
    """
    columns = _columns(votes, form_model, judged)
    contests: dict[tuple[str, str], list[int]] = {}
    for number, vote in enumerate(votes):
        model, other = sorted((vote["chosen_author"], vote["rejected_author"]))
        contests.setdefault((model, other), []).append(number)
    rows = []
    for (model, other), numbers in sorted(contests.items()):
        voters = sorted({votes[number]["voter"] for number in numbers})
        for voter in [*voters, None] if len(voters) > 1 else voters:
            own = [number for number in numbers if voter in (None, votes[number]["voter"])]
            figures = _figures({name: values[own] for name, values in columns.items()}, model)
            rows.append({"model": model, "other": other, "voter": voter, **figures})
    return rows


def judge_votes(
    evaluator: Any, votes: Sequence[Mapping[str, Any]], known: dict[str, float], most: int | None = None
) -> np.ndarray:
    """(N,) by how much a reward model prefers the chosen answers to the rejected ones; NaN where it was not asked.

    Args:
        evaluator: a `RewardModelEvaluator`.
        known: earlier answers of this evaluator; those of this call are added.
        most: votes to ask about, the latest first; all by default.
    """
    keys = [json.dumps([vote["prompt"], vote["chosen"], vote["rejected"]]) for vote in votes]
    fresh: dict[str, Mapping[str, Any]] = {}
    for key, vote in zip(keys, votes, strict=True):
        if vote["vote"] in SIDES and key not in known:
            fresh.pop(key, None)  # a vote like an earlier one is as late as itself
            fresh[key] = vote
    asked = [*fresh.items()][-most if most else 0 :] if most != 0 else []
    # What a chat template refuses has no opinion, now and later.
    refused = {
        key for key, vote in asked if any(first_refused(each.tokenizer, [vote["prompt"]]) for each in evaluator.members)
    }
    known.update(dict.fromkeys(refused, np.nan))
    asked = [each for each in asked if each[0] not in refused]
    if asked:
        prompts = [vote["prompt"] for _, vote in asked]
        texts = [[answer_text(vote, side) for _, vote in asked] for side in ("chosen", "rejected")]
        scores = np.array(evaluator.get_reward_scores(prompts * 2, texts[0] + texts[1])).reshape(2, -1)
        known.update(zip(dict(asked), (scores[0] - scores[1]).tolist(), strict=True))
    return np.array([known.get(key, np.nan) for key in keys], dtype=float)


def _columns(
    votes: Sequence[Mapping[str, Any]],
    form_model: Mapping[str, float] | None,
    judged: Sequence[float] | np.ndarray | None,
) -> dict[str, np.ndarray]:
    """(N,) choices, keys of the prompts, authors of the chosen answers, and the margins of each of `OPINIONS`.

    Each vote is read once, however many rows it counts for. Margins are NaN where nobody won, or nothing was said.
    """
    choices = np.array([vote["vote"] for vote in votes])
    chosen, rejected = ([answer_text(vote, side) for vote in votes] for side in ("chosen", "rejected"))
    unknown = np.full(len(votes), np.nan)
    margins = {
        "judge": unknown if judged is None else np.asarray(judged, dtype=float),
        "form": form_margins(form_model, form_differences(chosen, rejected)) if form_model else unknown,
        "longer": np.array([response_length(a) - response_length(b) for a, b in zip(chosen, rejected, strict=True)]),
    }
    return {
        "choice": choices,
        "prompt": np.array([prompt_key(vote["prompt"]) for vote in votes]),
        "chosen_author": np.array([vote["chosen_author"] for vote in votes]),
        **{name: np.where(np.isin(choices, SIDES), margins[name], np.nan) for name in OPINIONS},
    }


def _figures(columns: Mapping[str, np.ndarray], model: str) -> dict[str, Any]:
    choices, prompts = columns["choice"], columns["prompt"]
    decided, counted = np.isin(choices, SIDES), choices != "skip"
    won = decided & (columns["chosen_author"] == model)
    figures = {
        "votes": len(choices),
        "wins": int(won.sum()),
        "losses": int((decided & ~won).sum()),
        **{choice.replace(" ", "_"): int((choices == choice).sum()) for choice in NOBODY_WON},
        **_share("win_rate", np.where(decided, won, 0.5)[counted], prompts[counted]),
        **_share("left_rate", (choices[decided] == "left").astype(float), prompts[decided]),
    }
    for name in OPINIONS:
        spoke = np.isfinite(columns[name])
        figures |= _share(name, wins(columns[name][spoke]), prompts[spoke]) | {f"{name}_n": int(spoke.sum())}
    return figures


def _share(name: str, values: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    if not len(values):
        return {name: None, f"{name}_interval": None}
    return {name: float(values.mean()), f"{name}_interval": rate_interval(values, groups)}


def seen_prompts(votes: Iterable[Mapping[str, Any]], voter: str) -> set[int]:
    """Keys of the prompts that someone has voted on, so that others come first."""
    return {prompt_key(vote["prompt"]) for vote in votes if vote["voter"] == voter}
