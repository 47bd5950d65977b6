"""Speed of a training step: this project, TRL as it comes, and the plain recipe, on the same pairs.

In:  the pairs of `--pairs`, any source that `load_helpsteer_dataset.py` reads; the sample by default.
Out: a table on the terminal and, with `--json`, a file with all figures.

    python benchmarks/training_speed.py
    python benchmarks/training_speed.py --pairs my_pairs.jsonl --max_length 512 --json training_speed.json

ours   the trainer of `train_reward_model.py` with its constants
trl    `RewardTrainer` with the defaults of `RewardConfig` (bf16, gradient checkpointing), eight pairs a batch
plain  fp32, every conversation padded to `max_length`, no checkpointing

All get the token ids that this project makes, the same pairs in the same order, and the same settings of the
optimisation, so their losses are to be the same up to rounding. A turn is one update with 8 pairs.
"""

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict, load_from_disk
from transformers import PrinterCallback, TrainerCallback
from trl import RewardConfig, RewardTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import load_helpsteer_dataset
import train_reward_model as ours
from benchmarks import measure
from load_helpsteer_dataset import load_processed
from load_smollm_model import MODEL_NAME, load_reward_model, load_tokenizer, prefix_tree, resolve_model, run_script

PAIRS_PER_UPDATE = ours.PER_DEVICE_TRAIN_BATCH_SIZE * ours.GRADIENT_ACCUMULATION_STEPS
UPDATES = 64  # of a training; more than its warm-up and --rounds
COLUMNS = ["chosen_ids", "rejected_ids"]


class Turns(TrainerCallback):
    """An update is a turn, and reports its loss and its tokens."""

    def __init__(self, turns):
        self.turns, self.figures, self.seen = turns, {}, 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.figures = next(self.turns)

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.figures |= {"loss": logs["loss"], "tokens": logs["num_tokens"] - self.seen}
            self.seen = logs["num_tokens"]


def parse_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The flags that all benchmarks of the training have, besides those of the parser."""
    most = UPDATES - measure.WARM_UP - 1  # a turn ends when the next update begins, so the last update is none
    parser.add_argument("--pairs", nargs="+", default=["sample"], help="sources of pairs (default: the sample)")
    parser.add_argument("--max_length", type=int, default=256, help="tokens (default: %(default)s)")
    parser.add_argument("--rounds", type=measure.above_zero, default=7, help="updates each (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    if options.rounds > most:
        parser.error(f"--rounds must be at most {most}: all trainings here have {UPDATES} updates")
    return options


def prepare(source: list[str], model: str, max_length: int, directory: Path) -> None:
    """Pairs in the order in which all trainers take them, as processed data."""
    options = ["--output", str(directory / "data"), "--max_length", str(max_length), "--model", model]
    sys.argv = ["load_helpsteer_dataset.py", *options, "--source", *source]
    load_helpsteer_dataset.main()


def repeated(pairs, count: int):
    return pairs.select([place % len(pairs) for place in range(count)])


def run_ours(turns, directory: str, model: str) -> None:
    script, config, lora = ours.parse_settings(
        ["--data", f"{directory}/data", "--model", model, "--output_dir", f"{directory}/ours", *QUIET]
    )
    splits, metadata = load_processed(script.data)
    splits = DatasetDict(train=repeated(splits["train"], UPDATES * PAIRS_PER_UPDATE), validation=splits["validation"])
    trainer = ours.build_trainer(script, config, lora, splits, metadata, resolve_model(model))
    train(trainer, turns)


QUIET = [
    *("--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false", "--report_to", "none"),
    *("--disable_tqdm", "true", "--logging_steps", "1"),
]


def run_theirs(turns, directory: str, model: str, options: dict[str, Any]) -> None:
    source = resolve_model(model).path
    tokenizer = load_tokenizer(source)
    pairs = load_from_disk(f"{directory}/data")["train"]
    trainer = RewardTrainer(
        model=load_reward_model(source, tokenizer.pad_token_id),
        args=RewardConfig(
            output_dir=f"{directory}/theirs", per_device_train_batch_size=PAIRS_PER_UPDATE, save_strategy="no",
            report_to="none", disable_tqdm=True, logging_steps=1, use_cpu=ours.DEVICE.type == "cpu", seed=ours.SEED,
            learning_rate=ours.LEARNING_RATE, lr_scheduler_type=ours.LR_SCHEDULER_TYPE, warmup_steps=ours.WARMUP_STEPS,
            num_train_epochs=ours.NUM_TRAIN_EPOCHS, center_rewards_coefficient=ours.CENTER_REWARDS_COEFFICIENT,
            weight_decay=ours.WEIGHT_DECAY, max_grad_norm=ours.MAX_GRAD_NORM, **options,
        ),
        train_dataset=repeated(pairs, UPDATES * PAIRS_PER_UPDATE).select_columns(COLUMNS),
        processing_class=tokenizer,
    )  # fmt: skip
    train(trainer, turns)


def train(trainer, turns) -> None:
    trainer.add_callback(Turns(turns))
    trainer.remove_callback(PrinterCallback)
    with contextlib.suppress(StopIteration):
        trainer.train()


def tokens_per_pair(directory: Path) -> dict[str, float]:
    """Mean over the training pairs: of both conversations, and of them with their common prefix counted once."""
    pairs = load_from_disk(f"{directory}/data")["train"]
    both = [tuple(pair[name] for name in COLUMNS) for pair in pairs.select_columns(COLUMNS)]
    return {
        "tokens": sum(len(chosen) + len(rejected) for chosen, rejected in both) / len(both),
        "tokens_shared": sum(prefix_tree([*pair]).ids.shape[1] for pair in both) / len(both),
    }


def figures(turns: list[measure.Turn], parameters: int, rate: float) -> dict[str, float]:
    """Medians over the turns; `rate_share` counts all tokens of the data, whether or not they had to be computed.

    A token costs 6 operations a parameter (arXiv 2001.08361).
    """
    tokens_per_second = measure.rate([turn["tokens"] for turn in turns], [turn["seconds"] for turn in turns])
    return {
        "seconds": measure.median(turns, "seconds"),
        "pairs_per_second": PAIRS_PER_UPDATE / measure.median(turns, "seconds"),
        "tokens_per_second": tokens_per_second,
        "rate_share": measure.TRAINING * parameters * tokens_per_second / rate,
        "peak_memory": max(turn["peak_memory"] for turn in turns),
    }


def loss_difference(ours: list[measure.Turn], theirs: list[measure.Turn]) -> float:
    """The largest difference between the losses of the same update."""
    return max(abs(own["loss"] - other["loss"]) for own, other in zip(ours, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL_NAME, help="base model (default: %(default)s)")
    options = parse_options(parser)
    with tempfile.TemporaryDirectory() as directory:
        prepare(options.pairs, options.model, options.max_length, Path(directory))
        tokens = tokens_per_pair(Path(directory))
        source = resolve_model(options.model).path
        parameters = measure.body_parameters(load_reward_model(source, pad_token_id=0))
        plain = {"bf16": False, "gradient_checkpointing": False, "pad_to_multiple_of": options.max_length}
        machine = measure.machine()
        results = measure.take_turns(
            {
                "ours": (run_ours, (directory, options.model)),
                "trl": (run_theirs, (directory, options.model, {})),
                "plain": (run_theirs, (directory, options.model, plain)),
            },
            options.rounds,
        )
    print(measure.describe_machine(machine))
    dtypes = {"ours": measure.own_dtype(), "trl": torch.bfloat16, "plain": torch.float32}
    rows, summary = [], {}
    for name, turns in results.items():
        each = summary[name] = figures(turns, parameters, measure.rate_in(dtypes[name], machine))
        ratio = measure.statistics.median(measure.ratios(results["ours"], turns))
        each["ours_is_faster"] = ratio
        each["loss_difference"] = loss_difference(results["ours"], turns)
        rows.append(
            [name, f"{each['pairs_per_second']:.2f}", f"{each['tokens_per_second']:,.0f}", f"{each['rate_share']:.2f}",
             f"{each['peak_memory'] / 2**30:.1f} GiB", f"{ratio:.2f}", f"{each['loss_difference']:.4f}"]
        )  # fmt: skip
    measure.print_table(
        ["", "pairs/s", "tokens/s", "share of the rate", "peak memory", "ours is faster by", "loss differs by"], rows
    )
    once = tokens["tokens_shared"] / tokens["tokens"]
    print(
        f"{len(results['ours'])} updates each; a pair has {tokens['tokens']:.0f} tokens, "
        f"{tokens['tokens_shared']:.0f} with the common prefix counted once, "
        f"as ours computes it: {summary['ours']['rate_share'] * once:.2f} of the rate"
    )
    measure.write_figures(options.json, {"machine": machine, **tokens, "summary": summary, "turns": results})


if __name__ == "__main__":
    run_script(main)
