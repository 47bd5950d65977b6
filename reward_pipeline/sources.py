"""Files and repositories become rows, read as streams: nothing here holds more than a batch in memory."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, get_dataset_split_names, load_dataset, load_from_disk
from huggingface_hub import HfApi

from reward_pipeline.files import InputError, first_line
from reward_pipeline.formats import FILE_TYPES, KNOWN, OTHER_TYPES, ROWS, file_type, read_batches, rows_of_file
from reward_pipeline.hub import from_cache_alone, hub_reachable, hub_reason, patiently

HUB_DATASET = "esfrankel17/HelpSteer2_binarized"  # hub id of the default source
HUB_SPLIT = "average_rating_split"  # split of it; its siblings by --split
SAMPLE_FILE = Path(__file__).resolve().parents[1] / "sample_data" / "helpsteer_sample.jsonl"
SAVED = ("dataset_dict.json", "state.json")  # in a directory that `save_to_disk` wrote
SHOWN = 3  # names of files in a message
REVISION = re.compile("[0-9a-f]{40}")


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
    if path.is_dir() and Path.cwd().is_relative_to(path.resolve()):
        raise InputError(f"{name}: the scripts write here too; name a file, or a directory of data alone")
    if path.is_dir() and any((path / mark).is_file() for mark in SAVED):
        return open_saved(name, split)
    if path.is_dir() and not (path / "README.md").is_file():
        files = data_files(path, split)
        if not files:
            raise InputError(f"{name}: no data files here; known types are {KNOWN}")
        return Source(name, f"local directory {name}", (row for file in files for row in read_file(file)))
    if path.is_dir():
        return open_repository(name, f"local directory {name}", split, streaming)
    name = HUB_DATASET if name == "hub" else name
    if name.count("/") != 1 or file_type(path) in FILE_TYPES:
        raise InputError(f"{name}: no such file or directory")
    return open_repository(name, f"hub {name}", split, streaming, revision)


def data_files(path: Path, split: str | None) -> list[Path]:
    """The data files in a directory and below, in one order everywhere; what is left out is named."""
    found = sorted(file for file in path.rglob("*") if file.is_file())
    files = [file for file in found if file_type(file) in FILE_TYPES and (not split or file.name.startswith(split))]
    if others := [file.name for file in found if file_type(file) in OTHER_TYPES]:
        shown = ", ".join(others[:SHOWN]) + (", …" if len(others) > SHOWN else "")
        print(f"{path}: {len(others)} files of types that are not read are left out: {shown}")
    return files


def open_saved(name: str, split: str | None) -> Source:
    """Read what `save_to_disk` of `datasets` wrote, prepared data of this project too."""
    try:
        dataset = load_from_disk(name)
    except Exception as error:  # as in `open_repository`
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{name}: can not be read as a saved dataset ({reason})") from error
    if isinstance(dataset, DatasetDict):
        split = pick_split(name, list(dataset), split)
        return Source(name, f"local directory {name}, {split}", raw_rows(dataset[split], f"{name}, {split}"))
    if split:
        raise InputError(f"{name}: holds one split; leave --split {split} out")
    return Source(name, f"local directory {name}", raw_rows(dataset, name))


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
    """Rows as stored, but for what is kept as JSON: a picture or a sound may name any file to be opened.

    Raises:
        InputError: they can not be read to their end, such as a stream whose connection broke.
    """
    number = 0
    try:
        for number, values, problem in read_batches(dataset.with_format("arrow").iter(ROWS)):
            yield Row(f"{name} row {number}", values, problem)
    except Exception as error:  # a stream meets as many types as `open_repository`
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{name}: can not be read to its end (after row {number}: {reason})") from error


def pick_split(name: str, splits: list[str], wanted: str | None) -> str:
    """The wanted split, else the default one of HelpSteer2_binarized, else `train` or what begins so, else the only."""
    trained = [split for split in splits if split.startswith("train")]  # such as the `train_prefs` of UltraFeedback
    candidates = (
        [wanted] if wanted else [HUB_SPLIT, "train", *(each[0] for each in (trained, splits) if len(each) == 1)]
    )
    for candidate in candidates:
        if candidate in splits:
            return candidate
    raise InputError(f"{name}: choose one of its splits by --split: {', '.join(splits)}")


def read_file(path: Path) -> Iterator[Row]:
    """Rows of one data file, read as a stream.

    Raises:
        InputError: as `formats.rows_of_file`.
    """
    for file, number, values, problem in rows_of_file(path):
        yield Row(f"{file} row {number}", values, problem)
