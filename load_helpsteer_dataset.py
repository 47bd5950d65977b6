"""Preference pairs from any source become checked, split and tokenised training data.

In:  HelpSteer2 from the hub (where it can not be reached: the sample pairs of this project), or any `--source`.
Out: `processed_helpsteer/`: a DatasetDict with `train` and `validation`, `metadata.json`, `length_histogram.png`.

    python load_helpsteer_dataset.py
    python load_helpsteer_dataset.py --source my_pairs.jsonl more_pairs.csv --max_length 512
    python load_helpsteer_dataset.py --source nvidia/HelpSteer2 --limit 1000

Of several processes under `accelerate launch` only the first prepares data. Preference data larger than a disk is not
prepared at all: see `stream_processed` and `train_reward_model.py --streaming`.

A source is `hub` (the default dataset, an error where it can not be reached), `sample`, a hub id, a file
(.json, .jsonl, .csv, .parquet, each also .gz) or a directory (files, or laid out like a hub repository).
"""

import argparse
import codecs
import csv
import functools
import gzip
import hashlib
import itertools
import json
import math
import random
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ijson
import numpy as np
import pyarrow
import pyarrow.parquet
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    List,
    Value,
    get_dataset_split_names,
    load_dataset,
    load_from_disk,
)
from datasets.arrow_writer import ArrowWriter
from huggingface_hub import HfApi
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from conversations import (
    MIN_MAX_LENGTH,
    Messages,
    encode_batch,
    first_refused,
    parse_prompt,
    response_length,
    response_text,
)
from load_smollm_model import (
    MODEL_NAME,
    InputError,
    ModelSource,
    check_files,
    decided_by_first,
    first_line,
    hub_reachable,
    is_first_process,
    load_tokenizer,
    pick_device,
    replace_directory,
    resolve_model,
    run_script,
    write_checksums,
    write_text,
)

# ---------------------------------------------------------------------------------------------------------------------
HUB_DATASET = "esfrankel17/HelpSteer2_binarized"  # hub id of the default source
HUB_SPLIT = "average_rating_split"  # split of it; its siblings by --split
OUTPUT_DIR = "processed_helpsteer"  # directory, replaced as a whole
MAX_LENGTH = 256  # tokens of prompt, response and template together
MAX_LENGTH_MPS = 128  # tokens, on Apple MPS
VALIDATION_SHARE = 0.2  # of the pairs, split by prompt
SEED = 42  # for the split and for --limit
LIMIT = None  # pairs to keep, drawn at random; None keeps all
STREAM_BUFFER = 1000  # pairs of a stream among which the next one is drawn
# ---------------------------------------------------------------------------------------------------------------------

SAMPLE_FILE = Path(__file__).parent / "sample_data" / "helpsteer_sample.jsonl"
FILE_TYPES = (".json", ".jsonl", ".csv", ".parquet")
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")  # of a raw HelpSteer2 row
RATING_COLUMNS = {"chosen": ("chosen_rating", "chosen_score"), "rejected": ("rejected_rating", "rejected_score")}
READ_COLUMNS = {"prompt", "chosen", "rejected", "response", *ATTRIBUTES, *itertools.chain(*RATING_COLUMNS.values())}
BATCH_SIZE = 1000  # rows per step, for reading and tokenising
EXAMPLES = 3  # places kept of each reason to drop a pair
MAX_DEPTH = 100  # lists and objects in each other
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # as what bytes are decoded that are no UTF-8
BROKEN_FILE = (OSError, EOFError, zlib.error, ijson.JSONError, pyarrow.ArrowException, UnicodeDecodeError, csv.Error)
PAIR_FEATURES = Features(
    {
        "prompt": List({"role": Value("string"), "content": Value("string")}),
        "chosen": Value("string"),
        "rejected": Value("string"),
        "chosen_rating": Value("float64"),
        "rejected_rating": Value("float64"),
        "place": Value("string"),
        "prompt_key": Value("int64"),
        "pair_key": Value("int64"),
        "swapped": Value("bool"),
    }
)
KEY_COLUMNS = ["prompt_key", "pair_key", "swapped"]
STREAM_FEATURES = Features(
    {"chosen_ids": List(Value("int64")), "rejected_ids": List(Value("int64")), "place": Value("string")}
)
LENGTH_COLUMNS = ["prompt_length", "chosen_length", "rejected_length"]
COUNT_COLUMNS = [*LENGTH_COLUMNS, "prompt_cut", "response_cut", "over_max_length", "identical"]


class BadRow(ValueError):
    """A row that can not be used; the message is the reason under which it is counted."""


class Row(NamedTuple):
    """One row of a source and where it stands; `problem` is set where it could not even be read."""

    location: str
    values: dict[str, Any]
    problem: str | None = None


class Source(NamedTuple):
    """A source, opened: its rows, in words where they come from, and the revision of a hub dataset."""

    name: str
    origin: str
    rows: Iterable[Row]
    revision: str | None = None


# --- sources: each yields rows ---------------------------------------------------------------------------------------


def open_sources(names: list[str] | None, split: str | None) -> list[Source]:
    """Open the named sources; with none named, the hub's dataset or, out of its reach, the sample."""
    if names:
        check_split(names, split)
        return [open_source(name, split) for name in names]
    if hub_reachable():
        return [open_source("hub", split)]
    print(f"The hub can not be reached: using the sample pairs in {SAMPLE_FILE.parent.name}/ instead of {HUB_DATASET}.")
    return [open_source("sample", None)]


def check_split(names: list[str], split: str | None) -> None:
    """Make sure that a split is named only where one of the sources may have it.

    Raises:
        InputError: all are files.
    """
    if split and all(name == "sample" or Path(name).is_file() for name in names):
        raise InputError(f"{', '.join(names)}: files have no splits; leave --split {split} out")


def open_source(name: str, split: str | None = None, streaming: bool = False) -> Source:
    """Find one source by name; with `streaming`, a dataset of the hub is read while it is downloaded, not stored.

    Raises:
        InputError: no such file, directory or hub dataset; unknown file type or split; hub out of reach.
    """
    path = SAMPLE_FILE if name == "sample" else Path(name)
    if path.is_file():
        origin = "sample pairs of this project" if name == "sample" else f"local file {name}"
        return Source(name, origin, read_file(path))
    if path.is_dir() and not (path / "README.md").is_file():
        files = sorted(file for file in path.rglob("*") if file_type(file) in FILE_TYPES)
        if split:
            files = [file for file in files if file.name.startswith(split)]
        if not files:
            raise InputError(f"{name}: no data files here; known types are {', '.join(FILE_TYPES)} (also .gz)")
        return Source(name, f"local directory {name}", (row for file in files for row in read_file(file)))
    if path.is_dir():
        return open_repository(name, f"local directory {name}", split, streaming)
    name = HUB_DATASET if name == "hub" else name
    if name.count("/") != 1 or file_type(path) in FILE_TYPES:
        raise InputError(f"{name}: no such file or directory")
    if not hub_reachable():
        raise InputError(
            f"{name}: no such directory, and the hub can not be reached; try again online, or --source sample"
        )
    return open_repository(name, f"hub {name}", split, streaming)


def open_repository(name: str, origin: str, split: str | None, streaming: bool) -> Source:
    """Read a dataset repository with `datasets`: a hub id, or a local directory laid out like one."""
    try:
        revision = None if Path(name).is_dir() else HfApi().dataset_info(name).sha
        splits = get_dataset_split_names(name, revision=revision)
        split = pick_split(name, splits, split)
        dataset = load_dataset(name, split=split, revision=revision, streaming=streaming)
    except InputError:
        raise
    except Exception as error:  # `datasets` raises many types for what is missing, gated or broken
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{name}: can not be read as a dataset ({reason})") from error
    origin = f"{origin}, {split}" + (f", revision {revision}" if revision else "")
    return Source(name, origin, raw_rows(dataset, f"{name}, {split}"), revision)


def raw_rows(dataset: Dataset, name: str) -> Iterator[Row]:
    """Rows as stored: nothing is decoded, since a picture or a sound may name any file to be opened.

    Raises:
        InputError: they can not be read to their end, such as a stream whose connection broke.
    """
    number = 0
    try:
        for table in dataset.with_format("arrow").iter(BATCH_SIZE):
            for values in table.to_pylist():
                number += 1
                yield Row(f"{name} row {number}", values)
    except Exception as error:  # as many types as `open_repository` meets
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{name}: can not be read to its end (after row {number}: {reason})") from error


def pick_split(name: str, splits: list[str], wanted: str | None) -> str:
    """The wanted split, else the default one of HelpSteer2_binarized, else `train`, else the only one."""
    candidates = [wanted] if wanted else [HUB_SPLIT, "train", *(splits if len(splits) == 1 else [])]
    for candidate in candidates:
        if candidate in splits:
            return candidate
    raise InputError(f"{name}: choose one of its splits by --split: {', '.join(splits)}")


def file_type(path: Path) -> str:
    """Suffix without compression: `.jsonl` for `pairs.jsonl.gz`."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def read_file(path: Path) -> Iterator[Row]:
    """Rows of one data file, read as a stream.

    Raises:
        InputError: unknown type, or broken beyond single rows (damaged compression, Parquet or JSON array).
    """
    reader = {".jsonl": read_json, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}.get(file_type(path))
    if reader is None:
        raise InputError(f"{path}: unknown file type; known are {', '.join(FILE_TYPES)} (also .gz)")
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, values, problem in reader(file):
                if problem is None and not isinstance(values, dict):
                    values, problem = {}, "not an object with named columns"
                yield Row(f"{path} row {number}", values, problem)
    except BROKEN_FILE as error:
        raise InputError(
            f"{path}: can not be read to its end (after row {number}: {first_line(error)}); mend or restore the file"
        ) from error


def read_json(file) -> Iterator[tuple[int, Any, str | None]]:
    """JSON lines, or one array of objects."""
    start = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
    file.seek(start)
    first = file.read(1)
    while first.isspace():
        first = file.read(1)
    file.seek(start)
    if first == b"[":
        yield from read_json_array(file)
        return
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8")), None
        except UnicodeDecodeError:
            yield number, {}, "not valid UTF-8"
        except (ValueError, RecursionError):
            yield number, {}, "not valid JSON"


def read_json_array(file) -> Iterator[tuple[int, Any, str | None]]:
    """Items of one array. (Those of `ijson.items` would need memory quadratic in the depth of nesting.)"""
    number, depth = 0, 0
    for event, value in ijson.basic_parse(file, use_float=True):
        opens, closes = event.startswith("start_"), event.startswith("end_")
        if depth == 0 or (depth == 1 and closes):  # of the array itself
            depth += opens - closes
            continue
        if depth == 1:
            item, deepest = ijson.ObjectBuilder(), 1
        depth += opens
        deepest = max(deepest, depth)
        if depth <= MAX_DEPTH:
            item.event(event, value)
        depth -= closes
        if depth == 1:
            number += 1
            yield (number, item.value, None) if deepest <= MAX_DEPTH else (number, {}, "nested too deeply")


def read_csv(file) -> Iterator[tuple[int, Any, str | None]]:
    csv.field_size_limit(2**31 - 1)
    lines = (line.decode("utf-8-sig", "surrogateescape") for line in file)
    reader = csv.reader(lines)
    header = next((cells for cells in reader if cells), [])
    first = reader.line_num
    if any(map(NOT_UTF8.search, header)):
        raise InputError(f"{file.name} row {first}: not valid UTF-8; convert the file")
    if len(header) == 1:
        raise InputError(f"{file.name} row {first}: has one column, {header[0]!r}; cells must be separated by commas")
    if twice := [column for column, count in Counter(header).items() if column in READ_COLUMNS and count > 1]:
        raise InputError(f"{file.name} row {first}: has two columns {twice[0]!r}; rename one of them")
    # Not `DictReader`, which passes over blank lines without counting them, and `strict`: a quote that is never closed
    # would make one cell of the rest of the file.
    for number, cells in enumerate(csv.reader(lines, strict=True), start=first + 1):
        if not cells:
            continue
        if any(cells[len(header) :]):
            yield number, {}, "more cells than columns; text with commas needs quotes"
            continue
        try:
            yield number, dict(itertools.zip_longest(header, map(parse_cell, cells[: len(header)]))), None
        except BadRow as error:
            yield number, {}, str(error)


def parse_cell(value: Any) -> Any:
    """CSV has no lists: a cell that looks like a JSON message list is read as one."""
    if isinstance(value, str) and NOT_UTF8.search(value):
        raise BadRow("not valid UTF-8")
    if not (isinstance(value, str) and value.startswith("[{") and value.endswith("}]") and "role" in value):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow("message list is not valid JSON") from error


def read_parquet(file) -> Iterator[tuple[int, Any, str | None]]:
    number = 0
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=BATCH_SIZE):
        for row in batch.to_pylist():
            number += 1
            yield number, row, None


# --- rows become checked pairs ---------------------------------------------------------------------------------------


def join_raw_rows(rows: Iterable[Row]) -> Iterator[Row]:
    """Binarise raw HelpSteer2 rows; rows that are pairs already pass unchanged.

    Two consecutive rows with one prompt become a pair, rated by the mean of the five attributes (0-4, steps of 0.2);
    the better one is the chosen one.
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
    except RecursionError:  # lists in lists in lists
        return False


def _raw_pair(first: Row, second: Row) -> Row:
    try:
        rated = [
            (sum(_number(row.values.get(name)) for name in ATTRIBUTES) / len(ATTRIBUTES), row)
            for row in (first, second)
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
        },
    )


def check_pair(row: dict[str, Any]) -> dict[str, Any]:
    """One row in any published schema becomes a pair in ours.

    Returns:
        `prompt` (messages), `chosen`, `rejected` (assistant text), `chosen_rating`, `rejected_rating` (float or None).

    Raises:
        BadRow: the row is unusable; the message says why.
    """
    for column in ("chosen", "rejected"):
        if column not in row:
            raise BadRow(f"missing column {column}")
    if "prompt" not in row and not isinstance(row["chosen"], list):
        raise BadRow("missing column prompt")
    prompt = row["prompt"] if "prompt" in row else row["chosen"][:-1]
    if prompt is None or row["chosen"] is None or row["rejected"] is None:
        raise BadRow("null")
    try:
        messages = _unpacked(prompt)
    except (TypeError, ValueError) as error:
        raise BadRow("prompt is not a conversation that ends with a user turn") from error
    if not messages[-1]["content"].strip():
        raise BadRow("empty prompt")
    chosen, rejected = (_checked_response(messages, row[side]) for side in ("chosen", "rejected"))
    if chosen.strip() == rejected.strip():
        raise BadRow("chosen equals rejected")
    chosen_rating, rejected_rating = (_rating(row, side) for side in ("chosen", "rejected"))
    if chosen_rating is None or rejected_rating is None:
        chosen_rating = rejected_rating = None
    elif chosen_rating == rejected_rating:
        raise BadRow("tied ratings")
    elif chosen_rating < rejected_rating:
        raise BadRow("rating says the rejected is better")
    return {
        "prompt": messages,
        "chosen": chosen,
        "rejected": rejected,
        "chosen_rating": chosen_rating,
        "rejected_rating": rejected_rating,
    }


def checked_pairs(rows: Iterable[Row]) -> Iterator[tuple[Row, dict[str, Any] | None, str | None]]:
    """Rows of any schema, each with the pair that it holds, or with the reason why it holds none."""
    for row in join_raw_rows(rows):
        try:
            yield row, None if row.problem else check_pair(row.values), row.problem
        except BadRow as error:
            yield row, None, str(error)
        except RecursionError:
            yield row, None, "nested too deeply"


def readable_pairs(rows: Iterable[Row], tokenizer) -> Iterator[tuple[Row, dict[str, Any] | None, str | None]]:
    """As `checked_pairs`, without pairs whose turns the chat template refuses; some know no system turns."""

    @functools.cache  # what a template refuses is an order of roles, and there are few
    def refusal(roles: tuple[str, ...]) -> str | None:
        refused = first_refused(tokenizer, [[{"role": role, "content": role} for role in roles]], MAX_LENGTH)
        return refused[1] if refused else None

    for row, pair, reason in checked_pairs(rows):
        refused = refusal(tuple(message["role"] for message in pair["prompt"])) if pair else None
        yield (row, None, refused) if refused else (row, pair, reason)


def _checked_response(messages: Messages, completion: Any) -> str:
    try:
        text = response_text(completion)
        context = completion[:-1] if isinstance(completion, list) else []
        agrees = not context or _contents(_unpacked(context)) == _contents(messages)
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


def _contents(messages: Messages) -> list[tuple[str, str]]:
    return [(message["role"], message["content"].strip()) for message in messages]


def _rating(row: dict[str, Any], side: str) -> float | None:
    values = [row[name] for name in RATING_COLUMNS[side] if row.get(name) not in (None, "")]
    return _number(values[0]) if values else None


def _number(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow("rating is not a number")
    return number


def pair_keys(pair: dict[str, Any]) -> dict[str, Any]:
    """Hashes that find equal prompts, and equal or swapped pairs, without holding any text in memory."""
    prompt = json.dumps(_contents(pair["prompt"]))
    first, second = sorted((pair["chosen"].strip(), pair["rejected"].strip()))
    return {
        "prompt_key": _hash(prompt),
        "pair_key": _hash(json.dumps([prompt, first, second])),
        "swapped": first != pair["chosen"].strip(),
    }


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


class Tally:
    """Rows read, pairs in them, and pairs dropped with the reasons and the first places where each occurred."""

    def __init__(self):
        self.rows, self.pairs, self.dropped, self.examples = 0, 0, Counter(), {}

    def count(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            self.rows += 1
            yield row

    def drop(self, reason: str, location: str) -> None:
        self.dropped[reason] += 1
        if len(self.examples.setdefault(reason, [])) < EXAMPLES:
            self.examples[reason].append(location)

    def drop_pairs(self, reason: str, pairs: Dataset, indices: np.ndarray) -> None:
        if len(indices):
            self.dropped[reason] += len(indices)
            self.examples[reason] = list(pairs.select(indices[:EXAMPLES])["place"])


def write_pairs(sources: list[Source], path: Path, tally: Tally, tokenizer) -> Dataset:
    """Stream all usable rows into one Arrow file."""
    writer = ArrowWriter(path=str(path), features=PAIR_FEATURES, writer_batch_size=BATCH_SIZE)
    for source in sources:
        pairs = readable_pairs(tally.count(source.rows), tokenizer)
        for row, pair, reason in tqdm(pairs, desc=f"Reading {source.name}", unit=" pairs"):
            tally.pairs += 1
            if pair:
                writer.write({**pair, **pair_keys(pair), "place": row.location})
            else:
                tally.drop(reason, row.location)
    if tally.dropped.total() == tally.pairs:
        raise InputError(f"{', '.join(source.name for source in sources)}: no usable pair; {_why_nothing(tally)}")
    writer.finalize()
    return Dataset.from_file(str(path))


def _why_nothing(tally: Tally) -> str:
    if not tally.pairs:
        return "the source is empty"
    reason, count = tally.dropped.most_common(1)[0]
    first = tally.examples[reason][0]
    return f"{count} of {tally.pairs} pairs: {reason} (first: {first}); mend it or name another --source"


# --- pairs become splits ---------------------------------------------------------------------------------------------


def whole_columns(pairs: Dataset, names: list[str]) -> dict[str, np.ndarray]:
    """(N,) each, read batch by batch: `datasets` takes a kilobyte a row to read a filtered dataset at once."""
    batches = list(pairs.select_columns(names).with_format("numpy").iter(BATCH_SIZE))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in names}


def unique_pairs(pair_key: np.ndarray, swapped: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which pairs to keep: the first of equal ones, none of those that contradict each other.

    Args:
        pair_key: (N,) int64, the same for equal and for swapped pairs.
        swapped: (N,) bool, tells a pair from its contradiction.

    Returns:
        Indices of the pairs to keep, of their duplicates and of the pairs in contradictions, each in ascending order.
    """
    _, first, group = np.unique(pair_key, return_index=True, return_inverse=True)
    size = np.bincount(group)
    contradicts = (np.bincount(group, weights=swapped) % size) != 0
    kept = np.sort(first[~contradicts])
    return kept, np.setdiff1d(np.flatnonzero(~contradicts[group]), kept), np.flatnonzero(contradicts[group])


def split_by_prompt(prompt_key: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split pairs so that no prompt stands on both sides.

    Args:
        prompt_key: (N,) hash of each pair's prompt.
        share: part of the pairs for validation; prompts with several pairs may shift it by a few.
        seed: of the order in which prompts are drawn.

    Returns:
        Indices of the training and of the validation pairs, each in ascending order.

    Raises:
        InputError: fewer than two prompts.
    """
    _, prompt, sizes = np.unique(prompt_key, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise InputError("all pairs share one prompt; at least two are needed for a training and a validation split")
    wanted = len(prompt_key) - int(len(prompt_key) * (1 - share))
    order, taken = list(range(len(sizes))), 0
    random.Random(seed).shuffle(order)
    in_validation = np.zeros(len(sizes), dtype=bool)
    for index in order:
        if taken + sizes[index] <= wanted:
            in_validation[index] = True
            taken += sizes[index]
    if not in_validation.any():
        in_validation[min(order, key=lambda index: sizes[index])] = True
    validation = in_validation[prompt]
    return np.flatnonzero(~validation), np.flatnonzero(validation)


def draw(count: int, limit: int | None, seed: int) -> np.ndarray:
    """Indices of at most `limit` of `count` items, in ascending order."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, size=limit, replace=False))


def token_columns(batch: dict[str, list], tokenizer, max_length: int) -> dict[str, list]:
    """`chosen_ids`, `rejected_ids`, `length` and the counts that the statistics need, for a batch of pairs.

    Raises:
        InputError: the tokenizer's chat template can not show one of these conversations.
    """
    try:
        chosen = encode_batch(tokenizer, batch["prompt"], batch["chosen"], max_length)
        rejected = encode_batch(tokenizer, batch["prompt"], batch["rejected"], max_length)
    except ValueError as error:
        index, reason = first_refused(tokenizer, batch["prompt"], max_length)
        message = (
            f"{batch['place'][index]}: {tokenizer.name_or_path}: {reason}; leave the row out or use another --model"
        )
        raise InputError(message) from error
    pairs = list(zip(chosen, rejected, strict=True))
    return {
        "chosen_ids": [one.ids for one in chosen],
        "rejected_ids": [one.ids for one in rejected],
        "length": [max(len(one.ids), len(other.ids)) for one, other in pairs],
        "prompt_length": [one.prompt_length for one in chosen],
        "chosen_length": [one.response_length for one in chosen],
        "rejected_length": [one.response_length for one in rejected],
        "prompt_cut": [one.prompt_cut for one in chosen],
        "response_cut": [one.response_cut or other.response_cut for one, other in pairs],
        "over_max_length": [max(one.whole_length, other.whole_length) > max_length for one, other in pairs],
        "identical": [one.ids == other.ids for one, other in pairs],
    }


def tokenize_pairs(dataset: Dataset, tokenizer, max_length: int, name: str) -> Dataset:
    """Add the columns of `token_columns`."""
    return dataset.map(
        token_columns,
        batched=True,
        batch_size=BATCH_SIZE,
        fn_kwargs={"tokenizer": tokenizer, "max_length": max_length},
        remove_columns=KEY_COLUMNS,
        desc=f"Tokenising {name}",
    )


# --- or pairs become a stream ----------------------------------------------------------------------------------------


def is_validation_prompt(prompt_key: int, seed: int) -> bool:
    """Side of a prompt by its hash alone, for streams, of which no process ever sees all: `VALIDATION_SHARE` of all."""
    return _hash(f"{seed} {prompt_key}") % 2**32 < VALIDATION_SHARE * 2**32


def stream_pairs(source: str, split: str | None, tokenizer, seed: int, validation: bool) -> Iterator[dict[str, Any]]:
    """Usable pairs of the training or of the validation side, with their keys, from the source's beginning on."""
    for row, pair, _ in readable_pairs(open_source(source, split, streaming=True).rows, tokenizer):
        if pair:
            keys = pair_keys(pair)
            if is_validation_prompt(keys["prompt_key"], seed) == validation:
                yield {**pair, **keys, "place": row.location}


def stream_ids(source: str, split: str | None, tokenizer, max_length: int, seed: int) -> IterableDataset:
    """Token ids and places of the training pairs as a stream without end: over the source again and again.

    The order follows from source and seed alone: each pair is drawn from the next `STREAM_BUFFER` ones.
    """

    def differing_ids(batch: dict[str, list]) -> dict[str, list]:
        columns = {**batch, **token_columns(batch, tokenizer, max_length)}
        differs = [not same for same in columns["identical"]]
        return {name: list(itertools.compress(columns[name], differs)) for name in STREAM_FEATURES}

    place = {"source": source, "split": split, "tokenizer": tokenizer, "seed": seed, "validation": False}
    pairs = IterableDataset.from_generator(stream_pairs, features=PAIR_FEATURES, gen_kwargs=place)
    ids = pairs.map(
        differing_ids, batched=True, batch_size=BATCH_SIZE, remove_columns=list(PAIR_FEATURES), features=STREAM_FEATURES
    )
    if not list(ids.take(1)):
        raise InputError(f"{source}: no usable training pair; load_helpsteer_dataset.py --source names the reasons")
    return ids.shuffle(seed=seed, buffer_size=STREAM_BUFFER).repeat(None)


def stream_processed(
    source: str, split: str | None, model: ModelSource, max_length: int, validation_pairs: int, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `load_processed` returns, straight from a source: nothing is written.

    Rows are checked as always; duplicates and contradictions, for which all pairs would have to be known, stay.

    Args:
        source, split: as `open_source` takes them.
        model: whose tokenizer is used.
        validation_pairs: the first so many pairs of the validation side; all when there are fewer.
        seed: of the split and of the order.

    Returns:
        `train`, a stream of `STREAM_FEATURES`, and `validation`, a dataset in memory; the metadata.

    Raises:
        InputError: no usable pair on one of the sides, or the source can not be read.
    """
    check_split([source], split)
    tokenizer = load_tokenizer(model.path)
    held_out = list(itertools.islice(stream_pairs(source, split, tokenizer, seed, validation=True), validation_pairs))
    if not held_out:
        raise InputError(f"{source}: no usable validation pair; load_helpsteer_dataset.py --source names the reasons")
    pairs = Dataset.from_list(held_out, features=PAIR_FEATURES)
    keys = whole_columns(pairs, KEY_COLUMNS)
    splits = {
        "train": stream_ids(source, split, tokenizer, max_length, seed),
        "validation": tokenize_pairs(pairs, tokenizer, max_length, "validation"),
    }
    origin = open_source(source, split, streaming=True).origin
    metadata = {
        "source": f"stream of {origin}",
        "digest": f"{digest(keys['pair_key'], keys['swapped'])} of the validation pairs, {origin}{versions(source)}",
        "seed": seed,
        "max_length": max_length,
        "tokenizer": model.origin,
    }
    return splits, metadata


def versions(source: str) -> str:
    """Sizes and times of change of a local source's data files, as a hash; empty for the hub, which has revisions."""
    path = SAMPLE_FILE if source == "sample" else Path(source)
    files = sorted(file for file in [path, *path.rglob("*")] if file.is_file() and file_type(file) in FILE_TYPES)
    seen = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f", files {_hash(json.dumps(seen)):x}" if seen else ""


# --- statistics ------------------------------------------------------------------------------------------------------


def longer_wins(chosen: Iterable[str], rejected: Iterable[str]) -> float:
    """Accuracy of always preferring the answer with more characters (outer white space aside); ties count half."""
    extra = np.fromiter((response_length(a) - response_length(b) for a, b in zip(chosen, rejected, strict=True)), int)
    return float(np.mean((np.sign(extra) + 1) / 2))


def percentiles(values: np.ndarray) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(values, p)), 2) for p in (5, 25, 50, 75, 95, 99, 100)}


def statistics(splits: DatasetDict) -> dict[str, Any]:
    """What the pairs that are kept look like and what the length rule did to them; shares are of pairs."""
    columns = [*COUNT_COLUMNS, "length", "chosen_rating", "rejected_rating"]
    tables = {name: whole_columns(split, columns) for name, split in splits.items()}
    joined = {name: np.concatenate([table[name] for table in tables.values()]) for name in columns}
    gap = (joined["chosen_rating"] - joined["rejected_rating"]).astype(float)
    gap = gap[~np.isnan(gap)]
    return {
        "truncated_share": {
            "prompt": float(joined["prompt_cut"].mean()),
            "response": float(joined["response_cut"].mean()),
            "pair": float((joined["prompt_cut"] | joined["response_cut"]).mean()),
        },
        "over_max_length_share": float(joined["over_max_length"].mean()),
        "length_percentiles": {
            "prompt": percentiles(joined["prompt_length"]),
            "chosen": percentiles(joined["chosen_length"]),
            "rejected": percentiles(joined["rejected_length"]),
            "longer_side_after_cut": percentiles(joined["length"]),
        },
        "rating_gap": {"n": len(gap), "mean": round(float(gap.mean()), 3), **percentiles(gap)} if len(gap) else None,
        "longer_wins": {
            name: longer_wins(
                (row["chosen"] for row in split.select_columns(["chosen"])),
                (row["rejected"] for row in split.select_columns(["rejected"])),
            )
            for name, split in splits.items()
        },
    }


def plot_lengths(splits: DatasetDict, max_length: int, path: Path) -> None:
    """Histogram of prompt and response lengths before the cut."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    tables = [whole_columns(split, LENGTH_COLUMNS) for split in splits.values()]
    values = {
        name.removesuffix("_length"): np.concatenate([table[name] for table in tables]) for name in LENGTH_COLUMNS
    }
    last = max(np.percentile(lengths, 99) for lengths in values.values())
    for label, lengths in values.items():
        axes.hist(lengths, bins=np.linspace(0, max(last, max_length) * 1.02, 60), histtype="step", label=label)
    axes.axvline(max_length, color="black", linestyle="--", linewidth=1, label=f"max_length {max_length}")
    axes.set(
        xlabel="tokens before the cut (up to the 99th percentile)",
        ylabel="pairs",
        title="Lengths of prompts and responses",
    )
    axes.legend()
    figure.savefig(path, dpi=120)


def summary(metadata: dict[str, Any]) -> str:
    rows, sizes, cut = metadata["rows"], metadata["splits"], metadata["truncated_share"]
    longer, gap, limit = metadata["longer_wins"], metadata["rating_gap"], metadata["max_length"]
    lines = [
        f"source          {metadata['source']}",
        f"rows            {rows['read']:,} read, with {rows['pairs']:,} pairs: "
        f"{rows['dropped_total']:,} dropped, {rows['not_drawn']:,} over the limit, {rows['kept']:,} kept",
        *(f"  dropped       {count:,}: {reason}" for reason, count in rows["dropped"].items()),
        f"split           {sizes['train']:,} train / {sizes['validation']:,} validation, by unique prompt",
        f"cut to {limit:<8} {cut['prompt']:.1%} of the prompts, a response in {cut['response']:.1%} of pairs",
        f"over the length {metadata['over_max_length_share']:.1%} of the pairs, kept all the same",
        f"identical       {sum(metadata['identical_after_cut'].values())} pairs once cut",
        f"longer wins     {longer['train']:.3f} train, {longer['validation']:.3f} validation",
    ]
    if gap:
        lines.append(f"rating gap      {gap['mean']:.2f} on average, median {gap['p50']:.1f}")
    return "\n".join(lines)


# --- the stages, in order --------------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace, work: Path) -> tuple[DatasetDict, dict[str, Any]]:
    """Read, check, split and tokenise; `work` is a scratch directory. Returns the splits and their metadata."""
    model = resolve_model(options.model)
    tokenizer = load_tokenizer(model.path)
    sources, tally = open_sources(options.source, options.split), Tally()
    pairs = write_pairs(sources, work / "pairs.arrow", tally, tokenizer)

    keys = whole_columns(pairs, KEY_COLUMNS)
    kept, duplicates, contradicting = unique_pairs(keys["pair_key"], keys["swapped"])
    tally.drop_pairs("duplicate pair", pairs, duplicates)
    tally.drop_pairs("contradicting pair", pairs, contradicting)
    if not len(kept):
        raise InputError(f"{', '.join(source.name for source in sources)}: every pair contradicts another one")
    drawn = kept[draw(len(kept), options.limit, options.seed)]
    train, validation = split_by_prompt(keys["prompt_key"][drawn], VALIDATION_SHARE, options.seed)
    splits = DatasetDict(
        {
            name: tokenize_pairs(pairs.select(drawn[index]), tokenizer, options.max_length, name)
            for name, index in (("train", train), ("validation", validation))
        }
    )
    identical = {
        name: np.flatnonzero(whole_columns(split, ["identical"])["identical"]) for name, split in splits.items()
    }
    tally.drop_pairs("identical once cut to max_length (training pair)", splits["train"], identical["train"])
    splits["train"] = splits["train"].filter(lambda same: not same, input_columns="identical", desc="Checking cuts")
    if not len(splits["train"]):
        raise InputError("no training pair differs within max_length; raise --max_length")
    sizes = {name: len(split) for name, split in splits.items()}
    metadata = {
        "source": " + ".join(source.origin for source in sources),
        "revision": {source.name: source.revision for source in sources},
        "rows": {
            "read": tally.rows,
            "pairs": tally.pairs,
            "dropped_total": tally.dropped.total(),
            "dropped": dict(tally.dropped),
            "first_dropped": tally.examples,
            "not_drawn": len(kept) - len(drawn),
            "kept": sum(sizes.values()),
        },
        "splits": sizes,
        "digest": digest(keys["pair_key"][drawn], keys["swapped"][drawn]),
        "seed": options.seed,
        "max_length": options.max_length,
        "tokenizer": model.origin,
        "identical_after_cut": {name: len(indices) for name, indices in identical.items()},
        **statistics(splits),
    }
    return splits, metadata


def digest(pair_key: np.ndarray, swapped: np.ndarray) -> str:
    """Fingerprint of the pairs, whatever their order and wherever they came from."""
    return hashlib.blake2b(np.sort(pair_key * 2 + swapped).tobytes(), digest_size=8).hexdigest()


def load_processed(directory: str) -> tuple[DatasetDict, dict[str, Any]]:
    """Splits and metadata of a directory that this script wrote.

    Of several processes, which all have to call this, the first one looks for damage.

    Raises:
        InputError: nothing there, not complete, damaged, or of another version.
    """
    decided_by_first(lambda: check_files(directory, "run load_helpsteer_dataset.py again"))
    try:
        metadata = json.loads((Path(directory) / "metadata.json").read_text(encoding="utf-8"))
        splits = load_from_disk(directory)
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise InputError(f"{directory}: no complete dataset here; run load_helpsteer_dataset.py first") from error
    known = metadata.keys() >= {"source", "digest", "seed", "max_length", "tokenizer"}
    if not known or any("place" not in split.column_names for split in splits.values()):
        raise InputError(f"{directory}: made by another version of load_helpsteer_dataset.py; run it again")
    return splits, metadata


def default_max_length() -> int:
    """Tokens of a conversation where nobody says otherwise."""
    return MAX_LENGTH_MPS if pick_device().type == "mps" else MAX_LENGTH


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", nargs="+", metavar="SOURCE", help="one or several, joined (default: hub, else sample)"
    )
    parser.add_argument("--split", help=f"split of a dataset repository (default: {HUB_SPLIT}, else train)")
    parser.add_argument("--limit", type=int, default=LIMIT, help="pairs to keep, drawn at random (default: all)")
    parser.add_argument("--max_length", type=int, default=default_max_length(), help="tokens (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="of split and limit (default: %(default)s)")
    parser.add_argument("--model", default=MODEL_NAME, help="whose tokenizer is used (default: %(default)s)")
    parser.add_argument("--output", default=OUTPUT_DIR, help="directory, replaced as a whole (default: %(default)s)")
    options = parser.parse_args()
    if options.max_length < MIN_MAX_LENGTH:
        parser.error(f"--max_length must be at least {MIN_MAX_LENGTH}")
    if options.limit is not None and options.limit < 2:
        parser.error("--limit must be at least 2")
    if options.seed < 0:
        parser.error("--seed must not be negative")
    return options


def main() -> None:
    if not is_first_process():
        return
    options = parse_options()
    with replace_directory(options.output, marker="dataset_dict.json") as directory:
        work = directory / "work"
        work.mkdir()
        splits, metadata = prepare(options, work)
        plot_lengths(splits, options.max_length, directory / "length_histogram.png")
        splits.remove_columns(COUNT_COLUMNS).save_to_disk(directory)
        write_text(directory / "metadata.json", json.dumps(metadata, indent=2, ensure_ascii=False) + "\n")
        del splits
        shutil.rmtree(work)
        write_checksums(directory)
    print(summary(metadata))
    print(f"written to {options.output}/")


if __name__ == "__main__":
    run_script(main)
