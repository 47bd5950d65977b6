"""Pairs become `processed_helpsteer/`, and are read back; streams beside it."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value, load_from_disk
from datasets.arrow_writer import ArrowWriter
from tqdm.auto import tqdm

from reward_pipeline.conversations import encode_batch, first_refused
from reward_pipeline.files import InputError, check_files
from reward_pipeline.form import longer_wins
from reward_pipeline.models import ModelSource, load_tokenizer
from reward_pipeline.pairs import Tally, _hash, is_validation_prompt, pair_keys, readable_pairs
from reward_pipeline.processes import together
from reward_pipeline.schemas import category_of, checked_pairs
from reward_pipeline.sources import (
    BATCH_SIZE,
    FILE_TYPES,
    SAMPLE_FILE,
    Source,
    check_split,
    file_type,
    open_source,
    pick_split,
)

STREAM_BUFFER = 1000  # pairs of a stream among which the next one is drawn
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


def whole_columns(pairs: Dataset, names: list[str]) -> dict[str, np.ndarray]:
    """(N,) each, read batch by batch: `datasets` takes a kilobyte a row to read a filtered dataset at once."""
    batches = list(pairs.select_columns(names).with_format("numpy").iter(BATCH_SIZE))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in names}


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


def digest(pair_key: np.ndarray, swapped: np.ndarray) -> str:
    """Fingerprint of the pairs, whatever their order and wherever they came from."""
    return hashlib.blake2b(np.sort(pair_key * 2 + swapped).tobytes(), digest_size=8).hexdigest()


def load_processed(directory: str) -> tuple[DatasetDict, dict[str, Any]]:
    """Splits and metadata of a directory that this script wrote.

    Of several processes, which all have to call this, the first one looks for damage.

    Raises:
        InputError: nothing there, not complete, damaged, or of another version.
    """
    together(lambda: check_files(directory, "run load_helpsteer_dataset.py again"), first_alone=True)
    try:
        metadata = json.loads((Path(directory) / "metadata.json").read_text(encoding="utf-8"))
        splits = load_from_disk(directory)
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise InputError(f"{directory}: no complete dataset here; run load_helpsteer_dataset.py first") from error
    known = metadata.keys() >= {"source", "digest", "seed", "max_length", "tokenizer"}
    if not known or any("place" not in split.column_names for split in splits.values()):
        raise InputError(f"{directory}: made by another version of load_helpsteer_dataset.py; run it again")
    return splits, metadata


def read_pairs(name: str, split: str | None = None) -> Dataset:
    """Pairs of a processed directory (its validation split) or of any source, without the unusable rows.

    Returns:
        The columns of `load_helpsteer_dataset.check_pair`, with `place` (where the pair stands) and `category`.
    """
    if (Path(name) / "metadata.json").is_file():
        splits, _ = load_processed(name)
        return processed_pairs(splits, name, pick_split(name, list(splits), split or "validation"))
    pairs, dropped = [], 0
    for row, pair, _ in checked_pairs(open_source(name, split).rows):
        if pair:
            pairs.append({**pair, "place": row.location, "category": category_of(row.values)})
        else:
            dropped += 1
    if not pairs:
        raise InputError(f"{name}: no usable pair in {dropped} rows; load_helpsteer_dataset.py names the reasons")
    if dropped:
        print(f"{name}: {dropped:,} unusable rows left out (load_helpsteer_dataset.py names the reasons)")
    return Dataset.from_list(pairs)


def processed_pairs(splits: dict[str, Dataset], name: str, split: str) -> Dataset:
    """A processed split in the form of `read_pairs`."""
    pairs = splits[split].select_columns(["prompt", "chosen", "rejected", "chosen_rating", "rejected_rating"])
    places = [f"{name}, {split} row {number}" for number in range(1, len(pairs) + 1)]
    return pairs.add_column("place", places).add_column("category", [""] * len(pairs))


def check_tokens(split: Dataset, tokenizer, max_length: int, made_by: str) -> None:
    """Make sure that the data holds the ids that this tokenizer gives.

    Raises:
        InputError: the data was tokenised for another model.
    """
    rows = split.select(range(min(len(split), 8)))
    for side in ("chosen", "rejected"):
        encoded = encode_batch(tokenizer, rows["prompt"], rows[side], max_length)
        if [one.ids for one in encoded] != list(rows[f"{side}_ids"]):
            raise InputError(f"the data was tokenised with {made_by}; run load_helpsteer_dataset.py with this --model")


def data_identity(metadata: dict[str, Any]) -> dict[str, Any]:
    """What tells processed data from other data: the pairs, their split, and how they were cut."""
    return {name: metadata[name] for name in ("digest", "seed", "max_length", "tokenizer")}


def versions(source: str) -> str:
    """Sizes and times of change of a local source's data files, as a hash; empty for the hub, which has revisions."""
    path = SAMPLE_FILE if source == "sample" else Path(source)
    files = sorted(file for file in [path, *path.rglob("*")] if file.is_file() and file_type(file) in FILE_TYPES)
    seen = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f", files {_hash(json.dumps(seen)):x}" if seen else ""
