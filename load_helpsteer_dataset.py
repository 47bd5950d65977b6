"""Preference pairs from any source become checked, split and tokenised training data.

In:  HelpSteer2 from the hub (where it can not be reached: the sample pairs of this project), or any `--source`.
Out: `processed_helpsteer/`: a DatasetDict with `train` and `validation`, `metadata.json`, `length_histogram.png`.

    python load_helpsteer_dataset.py
    python load_helpsteer_dataset.py --source my_pairs.jsonl more_pairs.csv --max_length 512
    python load_helpsteer_dataset.py --source nvidia/HelpSteer2 --limit 1000
    python load_helpsteer_dataset.py --source votes.csv --columns prompt=question chosen=better rejected=worse

A source is `hub` (the default dataset, an error where it can not be reached), `sample`, a hub id, a file
(.json, .jsonl, .csv, .parquet, each also .gz) or a directory (files, or laid out like a hub repository).

Of several processes under `accelerate launch` only the first prepares data. Preference data larger than a disk is not
prepared at all: see `train_reward_model.py --streaming`.
"""

import argparse
import json
import shutil
from typing import Any

from reward_pipeline.conversations import MIN_MAX_LENGTH
from reward_pipeline.files import InputError, replace_directory, write_checksums, write_text
from reward_pipeline.processes import is_first_process, run_script
from reward_pipeline.settings import Parser, apple_silicon, column, filled_text, or_none, real, seed_number, whole

# ---------------------------------------------------------------------------------------------------------------------
# where from, where to
SOURCE = None  # one or several in a list, joined; None takes the hub's dataset, or the sample where it is out of reach
COLUMNS = None  # names in a layout that is not known, such as ["prompt=question"]
SPLIT = None  # of a dataset repository; None takes average_rating_split, else train
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # hub id or directory; its tokenizer is used
OUTPUT = "processed_helpsteer"  # directory, replaced as a whole
# what is kept
LIMIT = None  # pairs to keep, drawn at random; None keeps all
MAX_LENGTH = 128 if apple_silicon() else 256  # tokens of prompt, response and template together
VALIDATION_SHARE = 0.2  # of the pairs, split by prompt
SEED = 42  # of the draw and of the split
# ---------------------------------------------------------------------------------------------------------------------


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Flags over constants, checked before anything heavy is imported."""
    parser = Parser(__doc__)
    parser.flag("source", SOURCE, filled_text, "one or several, joined (default: hub, else sample)", nargs="+")
    parser.flag("columns", COLUMNS, column, "names in a layout that is not known: prompt=question …", nargs="+")
    parser.flag("split", SPLIT, filled_text, "of a dataset repository (default: average_rating_split, else train)")
    parser.flag("model", MODEL, filled_text, "whose tokenizer is used")
    parser.flag("output", OUTPUT, filled_text, "directory, replaced as a whole")
    parser.flag("limit", LIMIT, or_none(whole(2)), "pairs to keep, drawn at random (default: all)")
    parser.flag("max_length", MAX_LENGTH, whole(MIN_MAX_LENGTH), "tokens of prompt, response and template together")
    parser.flag("validation_share", VALIDATION_SHARE, real(above=0, below=1), "of the pairs, split by prompt")
    parser.flag("seed", SEED, seed_number, "of --limit and of the split")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_options()
    # Imported only now: a wrong flag is answered at once, and these take seconds.
    import numpy as np
    from datasets import DatasetDict

    from reward_pipeline.cards import dataset_card
    from reward_pipeline.layouts import renamed
    from reward_pipeline.models import find_model, load_tokenizer
    from reward_pipeline.pairs import REPEATS, Tally, draw, split_by_prompt, split_keys
    from reward_pipeline.plots import plot_lengths
    from reward_pipeline.processed import (
        COUNT_COLUMNS,
        data_statistics,
        digest,
        form_statistics,
        id_digest,
        keep_others,
        make_unique,
        tokenize_pairs,
        warn_of_near_duplicates,
        whole_columns,
        whole_lengths,
        write_pairs,
    )
    from reward_pipeline.sources import open_sources

    if not is_first_process():
        return  # the others would write the same files

    # Everything needed is found before anything is made.
    model = find_model(options.model, weights=False)
    tokenizer = load_tokenizer(model.path)
    sources = [
        source._replace(rows=renamed(source.rows, options.columns or ()))
        for source in open_sources(options.source, options.split)
    ]
    named = ", ".join(source.name for source in sources)
    if not options.source and sources[0].name == "sample":
        keep_others(options.output, sources[0])

    with replace_directory(options.output, marker="dataset_dict.json") as directory:
        # Rows are read and checked one by one into a scratch file, which may be larger than memory.
        work = directory / "work"
        work.mkdir()
        tally = Tally()
        if options.columns:
            tally.read_as.append(f"columns named by --columns: {', '.join(options.columns)}")
        pairs = write_pairs(sources, work / "pairs.arrow", tally, tokenizer)

        # Pairs are made unique: the first of equal ones stays, and none of two that say the opposite.
        pairs, keys = make_unique(pairs, named, tally)

        # Some are drawn, and split so that no prompt stands on both sides, in whatever spelling.
        drawn = draw(len(pairs), options.limit, options.seed)
        prompts = split_keys(keys["prompt_key"][drawn], keys["spelling_key"][drawn])
        train, validation = split_by_prompt(prompts, options.validation_share, options.seed)
        members = {"train": drawn[train], "validation": drawn[validation]}

        # Text becomes token ids, by the one rule that training, evaluation and REINFORCE share.
        splits = DatasetDict(
            {
                name: tokenize_pairs(pairs.select(indices), tokenizer, options.max_length, name)
                for name, indices in members.items()
            }
        )

        # A pair whose two sides the cut made the same has no gradient to give; in the validation it counts as a tie.
        identical = {name: whole_columns(split, ["identical"])["identical"] for name, split in splits.items()}
        tally.drop_pairs(
            "identical once cut to max_length (training pair)", splits["train"], np.flatnonzero(identical["train"])
        )
        splits["train"] = splits["train"].select(np.flatnonzero(~identical["train"]))
        members["train"] = members["train"][~identical["train"]]
        if not len(splits["train"]):
            remedy = REPEATS if REPEATS in tally.warned else "raise --max_length"
            raise InputError(f"{named}: no training pair differs within max_length; {remedy}")
        warn_of_near_duplicates(splits, tally)

        # What was read, what became of it, and by what the next stages know these data from others.
        sizes = {name: len(split) for name, split in splits.items()}
        metadata = {
            "source": " + ".join(source.origin for source in sources),
            "revision": {source.name: source.revision for source in sources},
            "spellings": int((prompts != keys["prompt_key"][drawn]).sum()),
            "rows": {**tally.summary(), "not_drawn": len(pairs) - len(drawn), "kept": sum(sizes.values())},
            "splits": sizes,
            "digest": digest(keys["pair_key"][drawn], keys["swapped"][drawn]),
            "split_digests": {
                name: digest(keys["pair_key"][indices], keys["swapped"][indices]) for name, indices in members.items()
            },
            "id_digests": {name: id_digest(split) for name, split in splits.items()},
            "validation_share": options.validation_share,
            "seed": options.seed,
            "max_length": options.max_length,
            "tokenizer": model.origin,
            "constants": {"MAX_LENGTH": MAX_LENGTH, "VALIDATION_SHARE": VALIDATION_SHARE, "LIMIT": LIMIT, "SEED": SEED},
            "identical_after_cut": {name: int(same.sum()) for name, same in identical.items()},
            **data_statistics(splits, options.max_length),
            **form_statistics(splits),
        }

        # All of it goes to the disk, and takes the place of the last one only when it is whole.
        plot_lengths(whole_lengths(splits), options.max_length, directory / "length_histogram.png")
        splits.remove_columns(COUNT_COLUMNS).save_to_disk(directory)
        write_text(directory / "metadata.json", json.dumps(metadata, indent=2, ensure_ascii=False) + "\n")
        write_text(directory / "README.md", dataset_card(metadata))
        del pairs, splits  # they are views of the files in `work`, which Windows does not delete while they are open
        shutil.rmtree(work)
        write_checksums(directory)

    print(summary(metadata))
    print(f"written to {options.output}/")


def summary(metadata: dict[str, Any]) -> str:
    """What a person wants to know of the prepared data, in lines."""
    rows, sizes, cut = metadata["rows"], metadata["splits"], metadata["truncated_share"]
    longer, gap, limit = metadata["longer_wins"], metadata["rating_gap"], metadata["max_length"]
    form = metadata["form_wins"]
    lines = [
        f"source          {metadata['source']}",
        *(f"read as         {layout}" for layout in dict.fromkeys(rows["read_as"])),
        f"rows            {rows['read']:,} read, with {rows['pairs']:,} pairs: "
        f"{rows['dropped_total']:,} dropped, {rows['not_drawn']:,} over the limit, {rows['kept']:,} kept",
        *(f"  dropped       {count:,}: {reason}" for reason, count in rows["dropped"].items()),
        f"split           {sizes['train']:,} train / {sizes['validation']:,} validation, by unique prompt",
        *(
            ["spellings       {:,} pairs have another pair's prompt, spelled otherwise".format(metadata["spellings"])]
            if metadata["spellings"]
            else []
        ),
        f"cut to {limit:<8} {cut['prompt']:.1%} of the prompts, a response in {cut['response']:.1%} of pairs",
        f"over the length {metadata['over_max_length_share']:.1%} of the pairs, kept all the same",
        f"identical       {sum(metadata['identical_after_cut'].values())} pairs once cut",
        f"longer wins     {longer['train']:.3f} train, {longer['validation']:.3f} validation",
        f"form model      {form['train']:.3f} train, {form['validation']:.3f} validation",
    ]
    if metadata["author_wins"]:
        known = ((name, share) for name, share in metadata["author_wins"].items() if share is not None)
        lines.append(f"authors         {', '.join(f'{share:.3f} {name}' for name, share in known)}")
    lines += [
        f"warning         {each['count']:,}: {words} ({', '.join(each['first'])})"
        for words, each in rows["warnings"].items()
    ]
    if gap:
        lines.append(f"rating gap      {gap['mean']:.2f} on average, median {gap['p50']:.1f}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
