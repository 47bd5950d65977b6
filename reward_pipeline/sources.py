"""Files and repositories become rows, read as streams: nothing here holds more than a batch in memory."""

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ijson
import pyarrow.parquet
from datasets import Dataset, get_dataset_split_names, load_dataset
from huggingface_hub import HfApi

from reward_pipeline.files import InputError, first_line
from reward_pipeline.hub import from_cache_alone, hub_reachable, hub_reason, patiently

HUB_DATASET = "esfrankel17/HelpSteer2_binarized"  # hub id of the default source
HUB_SPLIT = "average_rating_split"  # split of it; its siblings by --split
SAMPLE_FILE = Path(__file__).resolve().parents[1] / "sample_data" / "helpsteer_sample.jsonl"
FILE_TYPES = (".json", ".jsonl", ".csv", ".parquet")
ROWS = 1000  # rows per step, for reading and tokenising
MAX_DEPTH = 100  # lists and objects in each other; what comes after the parser goes through them by recursion
REVISION = re.compile("[0-9a-f]{40}")
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # as what bytes are decoded that are no UTF-8
BROKEN_FILE = (OSError, EOFError, zlib.error, ijson.JSONError, pyarrow.ArrowException, UnicodeDecodeError, csv.Error)

OpenFile = gzip.GzipFile | io.BufferedReader


class BadRow(ValueError):
    """A row that can not be used; the message is the reason under which it is counted."""


class OutOfReach(InputError):
    """A dataset of the hub can not be asked for, and is not in the cache."""


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


def open_sources(names: list[str] | None, split: str | None) -> list[Source]:
    """Open the named sources; with none named, the hub's dataset or, out of its reach, the sample."""
    if names:
        check_split(names, split)
        return [open_source(name, split) for name in names]
    with contextlib.suppress(OutOfReach):
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


def open_source(name: str, split: str | None = None, streaming: bool = False, revision: str | None = None) -> Source:
    """Find one source by name; with `streaming`, a dataset of the hub is read while it is downloaded, not stored.

    Args:
        revision: of a dataset of the hub, where the newest is not meant.

    Raises:
        InputError: no such file, directory or hub dataset; unknown file type or split; refused by the hub, or out of
            reach and not in its cache.
    """
    path = SAMPLE_FILE if name == "sample" else Path(name)
    if name == "sample" and not path.is_file():
        raise InputError(
            f"sample: {path} is missing; the sample comes with the project's directory: run the script there, or name "
            "another --source"
        )
    if path.is_file():
        origin = "sample pairs of this project" if name == "sample" else f"local file {name}"
        return Source(name, origin, read_file(path))
    if path.is_dir() and not (path / "README.md").is_file():
        files = sorted(file for file in path.rglob("*") if file_type(file) in FILE_TYPES)  # one order everywhere
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
    return open_repository(name, f"hub {name}", split, streaming, revision)


def open_repository(name: str, origin: str, split: str | None, streaming: bool, revision: str | None = None) -> Source:
    """Read a dataset repository with `datasets`: a hub id, or a local directory laid out like one."""
    local = Path(name).is_dir()

    def load(revision: str | None) -> tuple[Dataset, str]:
        found = pick_split(name, get_dataset_split_names(name, revision=revision), split)
        return load_dataset(name, split=found, revision=revision, streaming=streaming), found

    try:
        if not local and not hub_reachable():
            with from_cache_alone():
                dataset, split = load(revision)
        else:
            # Asked for once and named from then on: splits, rows and what is recorded are of one revision.
            if not local and revision is None:
                revision = patiently(lambda: HfApi().dataset_info(name)).sha
            dataset, split = patiently(lambda: load(revision))
    except InputError:
        raise
    except Exception as error:  # `datasets` raises many types for what is missing, gated or broken
        if local:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(f"{name}: can not be read as a dataset ({reason})") from error
        if not hub_reachable():
            raise OutOfReach(
                f"{name}: no such directory, and the hub can not be reached; try again online, or --source sample"
            ) from error
        raise InputError(hub_reason(name, error)) from error
    stored = None if local or streaming else revision_of(dataset)
    if stored and stored != revision:  # an older one, where the newest can not be read
        print(f"{name}: using revision {stored} from the cache" + (f", not {revision}" if revision else ""))
        revision = stored
    origin = f"{origin}, {split}" + (f", revision {revision}" if revision else "")
    return Source(name, origin, raw_rows(dataset, f"{name}, {split}"), revision)


def revision_of(dataset: Dataset) -> str | None:
    """The revision of a dataset of the hub that `datasets` has stored, by the name of its directory."""
    parts = [part for file in getattr(dataset, "cache_files", [])[:1] for part in Path(file["filename"]).parts]
    return next(filter(REVISION.fullmatch, parts), None)


def raw_rows(dataset: Dataset, name: str) -> Iterator[Row]:
    """Rows as stored: nothing is decoded, since a picture or a sound may name any file to be opened.

    Raises:
        InputError: they can not be read to their end, such as a stream whose connection broke.
    """
    number = 0
    try:
        for table in dataset.with_format("arrow").iter(ROWS):
            for values in table.to_pylist():
                number += 1
                yield Row(f"{name} row {number}", values)
    except Exception as error:  # a stream meets as many types as `open_repository`
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


def read_json(file: OpenFile) -> Iterator[tuple[int, Any, str | None]]:
    """JSON lines, or one array of objects: the first character tells, the file's name does not."""
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
        except (ValueError, RecursionError):  # the second one: a line of a hundred thousand brackets
            yield number, {}, "not valid JSON"


def read_json_array(file: OpenFile) -> Iterator[tuple[int, Any, str | None]]:
    """Items of one array, of any length: `json.load` would hold all of them in memory.

    Not `ijson.items`, which needs memory quadratic in the depth of nesting: a megabyte of brackets asks for all there
    is. Here what is deeper than `MAX_DEPTH` is walked through and not built; `deepest` remembers to refuse that item.
    """
    number, depth = 0, 0
    for event, value in ijson.basic_parse(file, use_float=True):
        opens, closes = event.startswith("start_"), event.startswith("end_")
        if depth == 0 or (depth == 1 and closes):  # the brackets of the array itself
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


def read_csv(file: OpenFile) -> Iterator[tuple[int, Any, str | None]]:
    """Rows of a CSV file whose first row that is not blank names the columns; all rows count, blank ones too."""
    csv.field_size_limit(2**31 - 1)  # by default 131,072 characters, and dialogues are longer
    # Bytes that are no UTF-8 are let through as surrogates here, so that they cost their row and not the file.
    lines = (line.decode("utf-8-sig", "surrogateescape") for line in file)
    reader = csv.reader(lines)
    header = next((cells for cells in reader if cells), [])
    first = reader.line_num
    if any(map(NOT_UTF8.search, header)):
        raise InputError(f"{file.name} row {first}: not valid UTF-8; convert the file")
    if len(header) == 1:
        raise InputError(f"{file.name} row {first}: has one column, {header[0]!r}; cells must be separated by commas")
    if twice := [column for column, count in Counter(header).items() if column and count > 1]:
        raise InputError(f"{file.name} row {first}: has two columns {twice[0]!r}; rename one of them")
    # Not `DictReader`, which passes over blank lines without counting them, and of two columns with one name keeps the
    # last one. `strict`, since a quote that is never closed would make one cell of the rest of the file, in silence.
    for number, cells in enumerate(csv.reader(lines, strict=True), start=first + 1):
        if not cells:
            continue
        if any(cells[len(header) :]):
            yield number, {}, "more cells than columns; text with commas needs quotes"
            continue
        try:
            yield number, dict(itertools.zip_longest(header, map(checked_cell, cells[: len(header)]))), None
        except BadRow as error:
            yield number, {}, str(error)


def checked_cell(value: Any) -> Any:
    """The same cell.

    Raises:
        BadRow: it has bytes that are no UTF-8.
    """
    if isinstance(value, str) and NOT_UTF8.search(value):
        raise BadRow("not valid UTF-8")
    return value


def read_parquet(file: OpenFile) -> Iterator[tuple[int, Any, str | None]]:
    """Rows of a Parquet file, batch by batch."""
    number = 0
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=ROWS):
        for row in batch.to_pylist():
            number += 1
            yield number, row, None
