"""The usual recipe, for comparison: the same pairs, seed and number of updates, prepared the way most public code does.

What it does differently from `train_reward_model.py`: the tokenizer by the class that its config names, default system
prompt in every conversation and a line break at its end, prompt and answer joined and cut on the right to the same
number of tokens, pad token = end-of-turn token, head as drawn and rounded to bf16, no centering, and the last state of
the training instead of the best checkpoint. `--parts` takes any of these but the last over from this project:

    length_rule  prompt and answer cut separately         template  no default system prompt, the end token is the last
    pad_token    pad is not the end of a turn             head      small fp32 head, centering
    tokenizer    the steps of its `tokenizer.json`: on the hub, SmolLM2's config names a class that splits no digits

In:  `processed_helpsteer/` (texts, split and `max_length` of it) and the settings of `train_reward_model.py`.
Out: figures on the whole validation split on the terminal and, with `--output`, as `evaluate_reward_model.py` does.

    python benchmarks/naive_recipe.py --max_train_samples 2000 --output naive
    python benchmarks/naive_recipe.py --parts length_rule template --output naive_with_two_parts
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TokenizersBackend, set_seed
from trl import RewardConfig, RewardTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure
from reward_pipeline.cards import write_evaluation
from reward_pipeline.conversations import encode, plain_template
from reward_pipeline.devices import autocast, autocast_dtype, keep_freed_memory, pick_device
from reward_pipeline.files import rounded, write_text
from reward_pipeline.models import PAD_TOKEN, load_reward_model, resolve_model
from reward_pipeline.pair_metrics import Columns, metrics_line, pair_metrics, text_columns
from reward_pipeline.pairs import draw
from reward_pipeline.processed import load_processed, processed_pairs
from reward_pipeline.processes import run_script
from reward_pipeline.runs import evaluation_directory
from reward_pipeline.settings import Parser, filled_text, or_none, seed_number, whole

PARTS = ("length_rule", "template", "pad_token", "head", "tokenizer")
BATCH_SIZE = 16  # conversations scored at once


def load_naive_tokenizer(path: str, parts: list[str]):
    tokenizer = (TokenizersBackend if "tokenizer" in parts else AutoTokenizer).from_pretrained(path)
    tokenizer.pad_token = PAD_TOKEN if "pad_token" in parts else tokenizer.eos_token
    if "template" in parts:
        tokenizer.chat_template = plain_template(tokenizer.chat_template)
    return tokenizer


def joined_ids(tokenizer, row: dict, side: str, max_length: int) -> list[int]:
    """Whole conversation through the template as it is, cut on the right."""
    return tokenizer.apply_chat_template([*row["prompt"], *row[side]])["input_ids"][:max_length]


def tokenize(pairs: Dataset, tokenizer, max_length: int, parts: list[str]) -> Dataset:
    def ids(row: dict, side: str) -> list[int]:
        if "length_rule" in parts:
            return encode(tokenizer, row["prompt"], row[side], max_length)
        return joined_ids(tokenizer, row, side, max_length)

    return pairs.map(
        lambda row: {f"{side}_ids": ids(row, side) for side in ("chosen", "rejected")},
        remove_columns=pairs.column_names,
        keep_in_memory=True,  # `datasets` would leave a file beside the prepared data
        desc="Tokenising",
    )


def load_naive_model(path: str, pad_token_id: int, seed: int, parts: list[str]):
    if "head" in parts:
        return load_reward_model(path, pad_token_id, seed)
    set_seed(seed)  # before the head is drawn, so that the run can be repeated
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = pad_token_id
    return model


@torch.inference_mode()
def score(model, sequences: list[list[int]]) -> np.ndarray:
    """Rewards of token id lists; equal ones are scored once."""
    distinct = sorted(dict.fromkeys(map(tuple, sequences)), key=len)
    rewards: dict[tuple[int, ...], float] = {}
    for start in tqdm(range(0, len(distinct), BATCH_SIZE), desc="Scoring"):
        batch = distinct[start : start + BATCH_SIZE]
        width = max(map(len, batch))
        pad = model.config.pad_token_id
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in batch], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=model.device)
        with autocast(model.device, autocast_dtype(model.device)):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        rewards.update(zip(batch, logits[:, 0].float().tolist(), strict=True))
    return np.array([rewards[tuple(row)] for row in sequences])


def train_and_score(options: argparse.Namespace) -> tuple[Columns, dict[str, Any]]:
    """Train on the drawn pairs and evaluate on the whole validation split."""
    splits, metadata = load_processed(options.data)
    path = resolve_model(options.model).path
    tokenizer = load_naive_tokenizer(path, options.parts)
    drawn = draw(len(splits["train"]), options.max_train_samples, options.seed)
    train = tokenize(splits["train"].select(drawn), tokenizer, metadata["max_length"], options.parts)
    validation = tokenize(splits["validation"], tokenizer, metadata["max_length"], options.parts)

    constants, dtype = measure.script("train_reward_model")["TRL_DEFAULTS"], autocast_dtype(pick_device())
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing")
    centering = constants["center_rewards_coefficient"] if "head" in options.parts else None
    with tempfile.TemporaryDirectory() as scratch:
        config = RewardConfig(
            **{name: constants[name] for name in (*measure.OPTIMISATION, *names)},
            bf16=dtype is torch.bfloat16,
            fp16=dtype is torch.float16,
            use_cpu=pick_device().type == "cpu",
            seed=options.seed,
            center_rewards_coefficient=centering,
            output_dir=scratch,
            max_length=None,
            save_strategy="no",
            report_to="none",
        )
        model = load_naive_model(path, tokenizer.pad_token_id, options.seed, options.parts)
        trainer = RewardTrainer(model=model, args=config, train_dataset=train, processing_class=tokenizer)
        trainer.train()

    ids = [list(validation[f"{side}_ids"]) for side in ("chosen", "rejected")]
    rewards = score(model.eval(), ids[0] + ids[1])
    columns = {
        **text_columns(
            processed_pairs(splits, options.data, "validation"),
            options.data,
            metadata["form_model"],
            metadata["author_strengths"],
        ),
        "chosen_reward": rewards[: len(validation)],
        "rejected_reward": rewards[len(validation) :],
    }
    metrics = {**pair_metrics(columns), "identical_after_cut": sum(a == b for a, b in zip(*ids, strict=True))}
    metrics |= {"train_pairs": len(train), "seed": options.seed, "parts": options.parts, "source": metadata["source"]}
    return columns, metrics


def main() -> None:
    constants = measure.script("train_reward_model")
    parser = Parser(__doc__)
    parser.flag("parts", [], str, "what to take over from this project", nargs="*", choices=PARTS)
    parser.flag("data", constants["DATA"], filled_text, "directory of load_helpsteer_dataset.py", metavar="DIR")
    limit = or_none(whole(1))
    parser.flag("max_train_samples", constants["MAX_TRAIN_SAMPLES"], limit, "pairs, drawn at random (default: all)")
    parser.flag("seed", constants["SEED"], seed_number, "of drawing, head and order")
    parser.flag("model", constants["MODEL"], filled_text, "base model: hub id or local directory")
    parser.flag("output", None, filled_text, "directory for figures and plots", metavar="DIR")
    options = parser.parse_args()
    if pick_device().type == "cpu":
        keep_freed_memory()

    with evaluation_directory(options.output) as directory:
        columns, metrics = train_and_score(options)
        print(f"{metrics_line(metrics)}; {metrics['identical_after_cut']:,} pairs identical after the cut")
        if directory:
            write_evaluation(columns, metrics, directory)
            write_text(directory / "metrics.json", json.dumps(rounded(metrics), indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
