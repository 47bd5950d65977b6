"""Pairs become `processed_helpsteer/`, and are read back; streams beside it.

Pairs may be more than memory holds: they go through Arrow files in batches, and only their hashes and lengths are ever
in memory together.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value, load_from_disk
from datasets.arrow_writer import ArrowWriter
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from reward_pipeline.conversations import encode_batch, first_refused, stripped_turns
from reward_pipeline.files import InputError, check_files
from reward_pipeline.form import (
    author_margins,
    fit_authors,
    fit_form_model,
    form_differences,
    form_margins,
    longer_wins,
)
from reward_pipeline.formats import FILE_TYPES, ROWS, file_type
from reward_pipeline.layouts import renamed
from reward_pipeline.models import ModelSource, load_tokenizer
from reward_pipeline.near_duplicates import near_duplicates
from reward_pipeline.negatives import mismatched_pairs
from reward_pipeline.pairs import (
    Tally,
    is_validation_prompt,
    pair_keys,
    readable_pairs,
    suspicions,
    text_hash,
    unique_pairs,
)
from reward_pipeline.processes import decided_once, together
from reward_pipeline.schemas import checked_pairs
from reward_pipeline.sources import (
    SAMPLE_FILE,
    Source,
    check_split,
    open_source,
    pick_split,
)
from reward_pipeline.statistics import wins

STREAM_BUFFER = 1000  # pairs of a stream among which the next one is drawn
FORM_PAIRS = 20_000  # at most, of a split, for the form model and the authors: some seconds
MESSAGES = List({"role": Value("string"), "content": Value("string")})
PAIR_FEATURES = Features(  # what `check_pair` returns, and where the pair stands
    {
        "prompt": MESSAGES,
        "chosen": MESSAGES,
        "rejected": MESSAGES,
        "chosen_rating": Value("float64"),
        "rejected_rating": Value("float64"),
        "category": Value("string"),
        "chosen_author": Value("string"),
        "rejected_author": Value("string"),
        "place": Value("string"),
    }
)
KEY_FEATURES = Features(
    {**dict.fromkeys(("prompt_key", "spelling_key", "pair_key"), Value("int64")), "swapped": Value("bool")}
)
IDENTITY = ("digest", "split_digests", "id_digests", "validation_share", "seed", "max_length")  # keys of the metadata
MOST_COMPARED = 200_000  # pairs, whose prompts are all in memory at once to be compared
STREAM_FEATURES = Features(
    {"chosen_ids": List(Value("int64")), "rejected_ids": List(Value("int64")), "place": Value("string")}
)
COUNT_COLUMNS = [  # of `token_columns`, for the statistics alone: not written to the disk
    *("prompt_length", "chosen_length", "rejected_length", "chosen_whole_length", "rejected_whole_length"),
    *("prompt_cut", "response_cut", "identical"),
]


def write_pairs(sources: list[Source], path: Path, tally: Tally, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Stream all usable rows into one Arrow file; `tally` counts them and the others.

    Returns:
        The file as a dataset: `PAIR_FEATURES` and, for what concerns all pairs at once, `KEY_FEATURES`.

    Raises:
        InputError: no row is usable, or a source can not be read to its end.
    """
    features = Features({**PAIR_FEATURES, **KEY_FEATURES})
    # Not `Dataset.from_generator`, which leaves all pairs in the user's cache; here they go with the scratch directory,
    # and so do the files that `Dataset.map` puts beside this one.
    writer = ArrowWriter(path=str(path), features=features, writer_batch_size=ROWS)
    for source in sources:
        pairs = readable_pairs(tally.count(source.rows), tokenizer)
        for row, pair, reason in tqdm(pairs, desc=f"Reading {source.name}", unit=" pairs"):
            tally.pairs += 1
            if pair:
                writer.write({**pair, **pair_keys(pair), "place": row.location})
                for words in suspicions(pair):
                    tally.warn(words, row.location)
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
    return f"{count} of {tally.pairs} pairs: {reason} (first: {first}); mend it or name another source"


def warn_of_near_duplicates(splits: DatasetDict, tally: Tally) -> None:
    """Count the validation prompts that are nearly the same as one of the training, such as with another word in it."""
    if sum(map(len, splits.values())) > MOST_COMPARED:
        return
    places: dict[str, dict[str, str]] = {name: {} for name in splits}
    for name, split in splits.items():
        for pair in split.select_columns(["prompt", "place"]):
            places[name].setdefault("\n".join(text for _, text, *_ in stripped_turns(pair["prompt"])), pair["place"])
    trained, held_out = (list(places[name]) for name in ("train", "validation"))
    for index, other in near_duplicates(held_out, trained):
        pair_of_places = f"{places['validation'][held_out[index]]} like {places['train'][trained[other]]}"
        tally.warn("a validation prompt is nearly the same as one of the training", pair_of_places)


def make_unique(pairs: Dataset, name: str, tally: Tally) -> tuple[Dataset, dict[str, np.ndarray]]:
    """Those pairs of `write_pairs` that `unique_pairs` keeps; `tally` counts the others.

    Returns:
        N pairs in their order, and their `KEY_FEATURES`, (N,) each.

    Raises:
        InputError: none is kept; `name` says of what.
    """
    keys = whole_columns(pairs, list(KEY_FEATURES))
    kept, duplicates, contradicting = unique_pairs(keys["pair_key"], keys["swapped"])
    tally.drop_pairs("duplicate pair", pairs, duplicates)
    tally.drop_pairs("contradicting pair", pairs, contradicting)
    if not len(kept):
        raise InputError(f"{name}: every pair contradicts another one")
    return pairs.select(kept), {key: values[kept] for key, values in keys.items()}


def whole_columns(pairs: Dataset, names: list[str]) -> dict[str, np.ndarray]:
    """(N,) each, read batch by batch: `datasets` takes a kilobyte a row to read a filtered dataset at once."""
    batches = list(pairs.select_columns(names).with_format("numpy").iter(ROWS))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in names}


def joined_columns(splits: DatasetDict, names: list[str]) -> dict[str, np.ndarray]:
    """As `whole_columns`, over all splits."""
    tables = [whole_columns(split, names) for split in splits.values()]
    return {name: np.concatenate([table[name] for table in tables]) for name in names}


def whole_lengths(splits: DatasetDict) -> dict[str, np.ndarray]:
    """(N,) tokens of whole conversations before the cut, of all pairs: `chosen` and `rejected`."""
    columns = joined_columns(splits, ["chosen_whole_length", "rejected_whole_length"])
    return {name.removesuffix("_whole_length"): lengths for name, lengths in columns.items()}


def token_columns(batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
    """`chosen_ids`, `rejected_ids`, `length` (of the longer side, in tokens) and `COUNT_COLUMNS`, for a batch of pairs.

    The ids have these names because TRL's `RewardTrainer` looks for them, and then tokenises nothing itself.

    Raises:
        InputError: the tokenizer's chat template can not show one of these conversations.
    """
    try:
        chosen = encode_batch(tokenizer, batch["prompt"], batch["chosen"], max_length)
        rejected = encode_batch(tokenizer, batch["prompt"], batch["rejected"], max_length)
    except ValueError as error:
        refused = first_refused(tokenizer, batch["prompt"])
        if refused is None:
            raise  # not the template's doing
        index, reason = refused
        place = batch["place"][index]
        raise InputError(
            f"{place}: {tokenizer.name_or_path}: {reason}; leave the row out or use another --model"
        ) from error
    pairs = list(zip(chosen, rejected, strict=True))
    # A prompt may be cut on one side only, where the other answer is short enough for the whole to fit.
    return {
        "chosen_ids": [one.ids for one in chosen],
        "rejected_ids": [one.ids for one in rejected],
        "length": [max(len(one.ids), len(other.ids)) for one, other in pairs],
        "prompt_length": [one.prompt_length for one in chosen],
        "chosen_length": [one.response_length for one in chosen],
        "rejected_length": [one.response_length for one in rejected],
        "chosen_whole_length": [one.whole_length for one in chosen],
        "rejected_whole_length": [one.whole_length for one in rejected],
        "prompt_cut": [one.prompt_cut or other.prompt_cut for one, other in pairs],
        "response_cut": [one.response_cut or other.response_cut for one, other in pairs],
        "identical": [one.ids == other.ids for one, other in pairs],
    }


def tokenize_pairs(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, name: str) -> Dataset:
    """The columns of `token_columns` in place of the keys."""
    return dataset.map(
        token_columns,
        batched=True,
        batch_size=ROWS,
        fn_kwargs={"tokenizer": tokenizer, "max_length": max_length},
        remove_columns=list(KEY_FEATURES),
        desc=f"Tokenising {name}",
    )


def differing_ids(
    batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int, features: Features
) -> dict[str, list]:
    """The columns `features` of a batch of pairs and of `token_columns`, without pairs that the cut made the same."""
    columns = {**batch, **token_columns(batch, tokenizer, max_length)}
    differs = [not same for same in columns["identical"]]
    return {name: list(itertools.compress(columns[name], differs)) for name in features}


def mismatched_ids(
    pairs: Dataset, share: float, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int
) -> Dataset:
    """`negatives.mismatched_pairs` of training pairs, tokenised: a dataset in memory, with the columns of `pairs`.

    The other answer is one of the same thousand pairs, and so mostly of the same source where several are joined:
    between sources the style alone would tell.
    """

    def made(batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
        drawn = mismatched_pairs(batch, share, np.random.default_rng([seed, numbers[0]]))
        return differing_ids(drawn, tokenizer, max_length, pairs.features)

    return pairs.map(
        made,
        batched=True,
        batch_size=ROWS,
        with_indices=True,
        features=pairs.features,
        keep_in_memory=True,  # `datasets` would leave a file beside the prepared data
        desc="Mismatching answers",
    )


def stream_pairs(
    source: str,
    split: str | None,
    tokenizer: PreTrainedTokenizerBase,
    validation_share: float,
    seed: int,
    validation: bool,
    columns: Sequence[str] = (),
    revision: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Usable pairs of the training or of the validation side, with their keys, from the source's beginning on."""
    rows = renamed(open_source(source, split, streaming=True, revision=revision).rows, columns)
    for row, pair, _ in readable_pairs(rows, tokenizer):
        if pair:
            keys = pair_keys(pair)
            if is_validation_prompt(keys["spelling_key"], validation_share, seed) == validation:
                yield {**pair, **keys, "place": row.location}


def stream_ids(
    source: str,
    split: str | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    validation_share: float,
    mismatched_share: float,
    seed: int,
    columns: Sequence[str] = (),
    revision: str | None = None,
) -> IterableDataset:
    """Token ids and places of the training pairs as a stream without end: over the source again and again.

    With `negatives.mismatched_pairs` of every thousand of them.
    The order follows from source and seed alone: each pair is drawn from the next `STREAM_BUFFER` ones.
    """

    def training_ids(batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
        drawn = mismatched_pairs(batch, mismatched_share, np.random.default_rng([seed, numbers[0]]))
        rows = {name: [*batch[name], *drawn[name]] for name in batch}
        return differing_ids(rows, tokenizer, max_length, STREAM_FEATURES)

    arguments = {
        "source": source,
        "split": split,
        "columns": tuple(columns),  # `datasets` deals the items of a list out to processes
        "tokenizer": tokenizer,
        "validation_share": validation_share,
        "seed": seed,
        "validation": False,
        "revision": revision,
    }
    features = Features({**PAIR_FEATURES, **KEY_FEATURES})
    # A generator, so that no process has to read the source before it trains, and each pass opens it anew.
    pairs = IterableDataset.from_generator(stream_pairs, features=features, gen_kwargs=arguments)
    ids = pairs.map(
        training_ids,
        batched=True,
        batch_size=ROWS,
        with_indices=True,
        remove_columns=list(features),
        features=STREAM_FEATURES,
    )
    if not list(ids.take(1)):
        raise InputError(f"{source}: no usable training pair; load_helpsteer_dataset.py --source names the reasons")
    return ids.shuffle(seed=seed, buffer_size=STREAM_BUFFER).repeat(None)


def stream_processed(
    source: str,
    split: str | None,
    model: ModelSource,
    max_length: int,
    validation_pairs: int,
    validation_share: float,
    mismatched_share: float,
    seed: int,
    columns: Sequence[str] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `load_processed` returns, straight from a source: nothing is written.

    Rows are checked as always; duplicates and contradictions, for which all pairs would have to be known, stay.

    Args:
        source, split: as `open_source` takes them.
        model: whose tokenizer is used.
        max_length: of a conversation, in tokens.
        validation_pairs: the first so many pairs of the validation side; all when there are fewer.
        validation_share: of the prompts, for the validation side.
        mismatched_share: of the training pairs, so many more with the answer to another prompt.
        seed: of the split and of the order.
        columns: names of columns, as `layouts.renamed` takes them.

    Returns:
        `train`, a stream of `STREAM_FEATURES`, and `validation`, a dataset in memory; the metadata.

    Raises:
        InputError: no usable pair on one of the sides, or the source can not be read.
    """
    check_split([source], split)
    tokenizer = load_tokenizer(model.path)
    # Found once: every pass and every process reads the same, whatever is committed meanwhile.
    opened = decided_once(lambda: open_source(source, split, streaming=True)._replace(rows=[]))
    pinned: dict[str, Any] = {"columns": columns, "revision": opened.revision}
    sides = (source, split, tokenizer, validation_share, seed)
    held_out = list(itertools.islice(stream_pairs(*sides, validation=True, **pinned), validation_pairs))
    if not held_out:
        raise InputError(f"{source}: no usable validation pair; load_helpsteer_dataset.py --source names the reasons")
    pairs = Dataset.from_list(held_out, features=Features({**PAIR_FEATURES, **KEY_FEATURES}))
    keys = whole_columns(pairs, list(KEY_FEATURES))
    seen = digest(keys["pair_key"], keys["swapped"])
    splits = {
        "train": stream_ids(source, split, tokenizer, max_length, validation_share, mismatched_share, seed, **pinned),
        "validation": tokenize_pairs(pairs, tokenizer, max_length, "validation"),
    }
    metadata = {
        "source": f"stream of {opened.origin}",
        # Nobody has seen all pairs: the source's revision, or its files' sizes and times, stand for the others.
        "digest": f"{seen} of the validation pairs, {opened.origin}{versions(source)}",
        "split_digests": {"validation": seen},
        "id_digests": {"validation": id_digest(splits["validation"])},
        "validation_share": validation_share,
        "seed": seed,
        "max_length": max_length,
        "tokenizer": model.origin,
    }
    return splits, metadata


def spread_over(split: Dataset) -> Dataset:
    """At most `FORM_PAIRS` pairs, over all sources alike."""
    return split.select(np.linspace(0, len(split) - 1, min(len(split), FORM_PAIRS)).astype(int))


def fitted_form_model(split: Dataset) -> dict[str, float]:
    """The form model of training pairs; of many, of `FORM_PAIRS` among them."""
    answers = spread_over(split.select_columns(["chosen", "rejected"]))
    return fit_form_model(form_differences(answers["chosen"], answers["rejected"]))


def form_statistics(splits: DatasetDict) -> dict[str, Any]:
    """The form model of the training pairs, the strengths of their authors, and the accuracy of either on both splits.

    Ties count half. That of the authors is over the pairs whose authors both have a strength, None without any.
    """
    differences, authors = {}, {}
    for name, split in splits.items():
        answers = spread_over(split)
        differences[name] = form_differences(answers["chosen"], answers["rejected"])
        authors[name] = answers["chosen_author"], answers["rejected_author"]
    weights, strengths = fit_form_model(differences["train"]), fit_authors(*authors["train"])
    by_author = {name: author_margins(strengths, *names) for name, names in authors.items()}
    known = {name: margins[~np.isnan(margins)] for name, margins in by_author.items()}
    author_wins = {name: float(wins(margins).mean()) if len(margins) else None for name, margins in known.items()}
    return {
        "form_model": weights,
        "form_wins": {name: float(wins(form_margins(weights, each)).mean()) for name, each in differences.items()},
        "author_strengths": strengths or None,
        "author_wins": author_wins if strengths else None,
    }


def percentiles(values: np.ndarray) -> dict[str, float]:
    """Seven percentiles by their names, `p5` to `p100`, with two decimals."""
    return {f"p{p}": round(float(np.percentile(values, p)), 2) for p in (5, 25, 50, 75, 95, 99, 100)}


def data_statistics(splits: DatasetDict, max_length: int) -> dict[str, Any]:
    """What the pairs that are kept look like and what the length rule did to them; shares are of pairs.

    Lengths are in tokens before the cut, but for `longer_side_after_cut`: `prompt` with the template around it,
    `chosen` and `rejected` without, `conversation` all of it, of the longer side of each pair.
    """
    joined = joined_columns(splits, [*COUNT_COLUMNS, "length", "chosen_rating", "rejected_rating"])
    whole = np.maximum(joined["chosen_whole_length"], joined["rejected_whole_length"])
    gap = (joined["chosen_rating"] - joined["rejected_rating"]).astype(float)
    gap = gap[~np.isnan(gap)]
    return {
        "truncated_share": {
            "prompt": float(joined["prompt_cut"].mean()),
            "response": float(joined["response_cut"].mean()),
            "pair": float((joined["prompt_cut"] | joined["response_cut"]).mean()),
        },
        "over_max_length_share": float((whole > max_length).mean()),
        "length_percentiles": {
            "prompt": percentiles(joined["prompt_length"]),
            "chosen": percentiles(joined["chosen_length"]),
            "rejected": percentiles(joined["rejected_length"]),
            "conversation": percentiles(whole),
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


def id_digest(pairs: Dataset) -> str:
    """Fingerprint of the token ids of all pairs: whatever template, tokenizer or rule for the length made them."""
    found = hashlib.blake2b(digest_size=8)
    for table in pairs.select_columns(["chosen_ids", "rejected_ids"]).with_format("arrow").iter(ROWS):
        for column in table.columns:
            ids = column.combine_chunks()
            found.update(pyarrow.compute.list_value_length(ids).to_numpy().tobytes())
            found.update(ids.flatten().to_numpy().tobytes())
    return found.hexdigest()


def load_processed(directory: str) -> tuple[DatasetDict, dict[str, Any]]:
    """Splits and metadata of a directory that `load_helpsteer_dataset.py` wrote.

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
    known = isinstance(metadata, dict) and metadata.keys() >= {"source", *IDENTITY}
    # An earlier version wrote answers as text, which read as messages would be nonsense.
    if not known or any(
        split.features.get(name) != PAIR_FEATURES[name] for split in splits.values() for name in PAIR_FEATURES
    ):
        raise InputError(f"{directory}: made by another version of load_helpsteer_dataset.py; run it again")
    return splits, metadata


def keep_others(directory: str, source: Source) -> None:
    """Refuse to let a source that nobody named take the place of prepared data from another one.

    Raises:
        InputError: it would.
    """
    try:
        there = json.loads((Path(directory) / "metadata.json").read_text(encoding="utf-8"))["source"]
    except (OSError, ValueError, LookupError, TypeError):
        return
    if there != source.origin:
        raise InputError(
            f"{directory}: holds pairs of {there}, which the {source.origin} would replace; "
            f"--source {source.name} does so, another --output keeps both"
        )


def read_pairs(name: str, split: str | None = None, columns: Sequence[str] = ()) -> Dataset:
    """Pairs of a processed directory (its validation split) or of any source, without the unusable rows.

    Args:
        columns: names of a source's columns, as `layouts.renamed` takes them.

    Returns:
        `PAIR_FEATURES`.

    Raises:
        InputError: no usable pair, or the source can not be read.
    """
    if (Path(name) / "metadata.json").is_file():
        if columns:
            raise InputError(f"{name}: holds prepared data, whose columns are known; leave --columns out")
        splits, _ = load_processed(name)
        return processed_pairs(splits, name, pick_split(name, list(splits), split or "validation"))
    pairs, tally = [], Tally()
    for row, pair, reason in checked_pairs(renamed(open_source(name, split).rows, columns)):
        tally.pairs += 1
        # Tool calls become text by the template of one model, and here there may be several.
        if pair and any("tool_calls" in message for message in pair["prompt"]):
            reason = "a turn calls a tool; load_helpsteer_dataset.py --model reads it by the template of one model"
        if pair and not reason:
            pairs.append({**pair, "place": row.location})
        else:
            tally.drop(str(reason), row.location)
    if not pairs:
        raise InputError(f"{name}: no usable pair; {_why_nothing(tally)}")
    if tally.dropped:
        reasons = "; ".join(f"{count:,}: {reason}" for reason, count in tally.dropped.most_common())
        print(f"{name}: {tally.dropped.total():,} of {tally.pairs:,} pairs can not be used ({reasons})")
    return Dataset.from_list(pairs, features=PAIR_FEATURES)  # named, since a column of None alone has no type


def processed_pairs(splits: dict[str, Dataset], name: str, split: str) -> Dataset:
    """A processed split in the form of `read_pairs`; a pair stands where it is here, not where it came from."""
    pairs = splits[split].select_columns([column for column in PAIR_FEATURES if column != "place"])
    return pairs.add_column("place", [f"{name}, {split} row {number}" for number in range(1, len(pairs) + 1)])


def check_tokens(split: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, made_by: str) -> None:
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
    """What tells processed data from other data: the pairs, on which side each is, and their token ids."""
    return {name: metadata[name] for name in IDENTITY}


def versions(source: str) -> str:
    """Sizes and times of change of a local source's data files, as a hash; empty for the hub, which has revisions."""
    path = SAMPLE_FILE if source == "sample" else Path(source)
    files = sorted(file for file in [path, *path.rglob("*")] if file.is_file() and file_type(file) in FILE_TYPES)
    seen = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f", files {text_hash(json.dumps(seen)):x}" if seen else ""
