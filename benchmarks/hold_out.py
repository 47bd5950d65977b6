"""A share of the prompts is held out: pairs from any source become two files of pairs, without a prompt in common.

In:  sources as `load_helpsteer_dataset.py --source` takes them; several are joined.
Out: JSON lines in this project's schema, which every script reads as a source.

    python benchmarks/hold_out.py sample --train train.jsonl --validation validation.jsonl
    python benchmarks/hold_out.py sample --train train.jsonl --validation validation.jsonl --unseen other.jsonl

Pairs are checked, made unique and split as `load_helpsteer_dataset.py` does it: the same sources, share and seed give
the same two sides, but for the training pairs that it drops since they are identical once cut. To train on several sets
and evaluate on each by itself, hold out of each, and join the training files. Two sets may have prompts in common, on
different sides: name the validation files of all sets as `--unseen`, and no prompt of theirs is trained on.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure
from reward_pipeline.files import InputError, json_lines, replace_file
from reward_pipeline.models import load_tokenizer, resolve_model
from reward_pipeline.pairs import Tally, spelling_key, split_by_prompt, split_keys
from reward_pipeline.processed import PAIR_FEATURES, make_unique, read_pairs, write_pairs
from reward_pipeline.processes import run_script
from reward_pipeline.settings import Parser, filled_text, real, seed_number
from reward_pipeline.sources import SAMPLE_FILE, open_sources

COLUMNS = [name for name in PAIR_FEATURES if name != "place"]  # of a line, where known


def known_values(pair: dict[str, Any]) -> dict[str, Any]:
    """The columns of a pair that say something."""
    return {name: pair[name] for name in COLUMNS if pair[name] not in (None, "")}


def check_outputs(options: argparse.Namespace) -> None:
    """Make sure that neither file replaces a source or the other file.

    Raises:
        InputError: one does.
    """
    outputs = {"train": options.train, "validation": options.validation}
    if len({Path(output).resolve() for output in outputs.values()}) < len(outputs):
        raise InputError(f"--train and --validation: both are {options.train}; name two files")
    for (name, output), source in itertools.product(outputs.items(), options.sources):
        place, read = Path(output).resolve(), (SAMPLE_FILE if source == "sample" else Path(source)).resolve()
        if read in (place, *place.parents):  # a directory is read with all that is in it
            raise InputError(f"--{name} {output}: belongs to the source {source}; name another file")


def write_sides(train: Dataset, train_path: str, validation: Dataset, validation_path: str) -> None:
    """Each side's pairs as lines of its file: both files, or neither."""
    with replace_file(train_path) as train_file, replace_file(validation_path) as validation_file:
        for file, pairs in ((train_file, train), (validation_file, validation)):
            file.writelines(json_lines([known_values(pair)]) for pair in pairs)


def main() -> None:
    constants = measure.script("load_helpsteer_dataset")
    parser = Parser(__doc__)
    parser.add_argument("sources", nargs="+", type=filled_text, metavar="SOURCE", help="of pairs; several are joined")
    parser.flag("train", None, filled_text, "file for the training pairs", required=True, metavar="FILE")
    parser.flag("validation", None, filled_text, "file for the pairs held out", required=True, metavar="FILE")
    share = real(above=0, below=1)
    parser.flag("validation_share", constants["VALIDATION_SHARE"], share, "of the pairs, split by prompt")
    parser.flag("seed", constants["SEED"], seed_number, "of the split")
    parser.flag("unseen", [], filled_text, "pairs whose prompts are not trained on", nargs="+", metavar="SOURCE")
    parser.flag("model", constants["MODEL"], filled_text, "whose chat template has to take the conversations")
    options = parser.parse_args()
    check_outputs(options)

    tokenizer = load_tokenizer(resolve_model(options.model).path)
    sources = open_sources(options.sources, None)
    tally = Tally()
    with tempfile.TemporaryDirectory() as scratch:
        pairs = write_pairs(sources, Path(scratch) / "pairs.arrow", tally, tokenizer)
        pairs, keys = make_unique(pairs, ", ".join(options.sources), tally)
        prompts = split_keys(keys["prompt_key"], keys["spelling_key"])
        train, validation = split_by_prompt(prompts, options.validation_share, options.seed)
        held_out = [spelling_key(prompt) for name in options.unseen for prompt in read_pairs(name)["prompt"]]
        train = train[~np.isin(keys["spelling_key"][train], held_out)]
        if not len(train):
            raise InputError("--unseen: has the prompts of all training pairs; name other pairs")
        write_sides(pairs.select(train), options.train, pairs.select(validation), options.validation)

    dropped = "".join(f"; {count:,} dropped: {reason}" for reason, count in tally.dropped.items())
    print(f"{tally.pairs:,} pairs read{dropped}")
    print(f"{len(train):,} written to {options.train}, {len(validation):,} to {options.validation}")


if __name__ == "__main__":
    run_script(main)
