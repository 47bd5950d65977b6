"""Speed of a training step: this project, TRL as it comes, and the plain recipe, on the same pairs.

In:  the pairs of `--pairs`, any source that `load_helpsteer_dataset.py` reads; the sample by default.
Out: a table on the terminal and, with `--json`, a file with all figures.

    python benchmarks/training_speed.py
    python benchmarks/training_speed.py --pairs my_pairs.jsonl --max_length 512 --json training_speed.json

ours   `train_reward_model.py` with its constants, but for the form term and the answers to other prompts
trl    `RewardTrainer` with the defaults of `RewardConfig` (bf16, gradient checkpointing), eight pairs a batch
plain  fp32, every conversation padded to `max_length`, no checkpointing

All get the token ids that this project makes, the same pairs in the same order, and the same settings of the
optimisation, so their losses are to be the same up to rounding. A turn is one update with 8 pairs. Where the hardware
has no bf16, TRL is compared with it off.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from transformers import TrainerCallback
from trl import RewardConfig, RewardTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure
from reward_pipeline import reward_training
from reward_pipeline.conversations import MIN_MAX_LENGTH
from reward_pipeline.devices import pick_device
from reward_pipeline.models import PACKAGED_MODEL, load_reward_model, load_tokenizer, resolve_model
from reward_pipeline.prefix_sharing import prefix_tree
from reward_pipeline.processes import run_script
from reward_pipeline.settings import Parser, filled_text, whole

TRAINING = measure.script("train_reward_model")
PAIRS_PER_UPDATE = TRAINING["PER_DEVICE_TRAIN_BATCH_SIZE"] * TRAINING["GRADIENT_ACCUMULATION_STEPS"]
UPDATES = 64  # of a training; more than its warm-up and --rounds
COLUMNS = ["chosen_ids", "rejected_ids"]
QUIET = [
    *("--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false", "--report_to", "none"),
    *("--disable_tqdm", "true", "--logging_steps", "1"),
]


class Turns(TrainerCallback):
    """An update is a turn, and reports its loss and its tokens."""

    def __init__(self, turns):
        self.turns, self.figures, self.seen = turns, {}, 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.figures = measure.next_turn(self.turns)

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.figures |= {"loss": logs["loss"], "tokens": logs["num_tokens"] - self.seen}
            self.seen = logs["num_tokens"]

    def on_train_end(self, args, state, control, **kwargs):
        raise measure.Over  # what a script does after its training is not compared


def parser(docstring: str) -> Parser:
    """Parser with the flags that all benchmarks of the training have."""
    # A turn ends when the next update begins, so the last update is none.
    made = measure.parser(docstring, rounds=7, most=UPDATES - measure.WARM_UP - 1)
    made.flag("pairs", ["sample"], filled_text, "sources of pairs", nargs="+", metavar="SOURCE")
    made.flag("max_length", 256, whole(MIN_MAX_LENGTH), "tokens")
    return made


def prepare(source: list[str], model: str, max_length: int, directory: Path) -> None:
    """Pairs in the order in which all trainers take them, as processed data."""
    flags = ["--output", directory / "data", "--max_length", max_length, "--model", model]
    measure.run("load_helpsteer_dataset", *flags, "--source", *source)


def repeated(pairs: Dataset) -> Dataset:
    """As many pairs as all updates take."""
    return pairs.select([place % len(pairs) for place in range(UPDATES * PAIRS_PER_UPDATE)])


def run_ours(turns, directory: str, model: str) -> None:
    """The script itself, which builds its trainer as ever; its updates are the turns."""

    class TurnTrainer(reward_training.PairTrainer):
        def __init__(self, *arguments: Any, train_dataset: Dataset, **options: Any):
            super().__init__(*arguments, train_dataset=repeated(train_dataset), **options)
            self.add_callback(Turns(turns))

    reward_training.PairTrainer = TurnTrainer
    # With --max_steps the script knows how many updates there will be, before it builds the trainer.
    flags = ["--data", f"{directory}/data", "--model", model, "--output_dir", f"{directory}/ours"]
    flags += ["--form_term", "false", "--mismatched_share", "0"]  # the pairs and the loss of the others
    measure.run("train_reward_model", *flags, "--max_steps", UPDATES, *QUIET)


def run_theirs(turns, directory: str, model: str, options: dict[str, Any]) -> None:
    source = resolve_model(model).path
    tokenizer = load_tokenizer(source)
    pairs = load_from_disk(f"{directory}/data")["train"]
    constants = TRAINING["TRL_DEFAULTS"]
    shared = {name: constants[name] for name in ("seed", "center_rewards_coefficient", *measure.OPTIMISATION)}
    trainer = RewardTrainer(
        model=load_reward_model(source, tokenizer.pad_token_id, constants["seed"]),
        args=RewardConfig(
            output_dir=f"{directory}/theirs", per_device_train_batch_size=PAIRS_PER_UPDATE, save_strategy="no",
            report_to="none", disable_tqdm=True, logging_steps=1, use_cpu=pick_device().type == "cpu",
            **shared, **options,
        ),
        train_dataset=repeated(pairs).select_columns(COLUMNS),
        processing_class=tokenizer,
        callbacks=[Turns(turns)],
    )  # fmt: skip
    trainer.train()


def trl_format(own: torch.dtype) -> dict[str, bool]:
    """Number format of TRL: its default, bf16, where the hardware has it, and otherwise what this project takes there.

    A CPU without it emulates bf16, many times slower than it computes fp32: that, and not TRL, would be measured.
    """
    return {} if own is torch.bfloat16 else {"bf16": False, "fp16": own is torch.float16}


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
        "peak_memory": measure.most_memory(turns),
    }


def loss_difference(ours: list[measure.Turn], theirs: list[measure.Turn]) -> float:
    """The largest difference between the losses of the same update."""
    return max(abs(own["loss"] - other["loss"]) for own, other in zip(ours, theirs, strict=True))


def main() -> None:
    flags = parser(__doc__)
    flags.flag("model", PACKAGED_MODEL, filled_text, "base model: hub id or local directory")
    options = flags.parse_args()
    own = measure.own_dtype()
    with tempfile.TemporaryDirectory() as directory:
        prepare(options.pairs, options.model, options.max_length, Path(directory))
        tokens = tokens_per_pair(Path(directory))
        source = resolve_model(options.model).path
        parameters = measure.body_parameters(load_reward_model(source, pad_token_id=0, seed=0))
        plain = {"bf16": False, "gradient_checkpointing": False, "pad_to_multiple_of": options.max_length}
        machine = measure.machine()
        results = measure.take_turns(
            {
                "ours": (run_ours, (directory, options.model)),
                "trl": (run_theirs, (directory, options.model, trl_format(own))),
                "plain": (run_theirs, (directory, options.model, plain)),
            },
            options.rounds,
        )
    print(measure.describe_machine(machine))
    rows, summary = [], {}
    for name, dtype in {"ours": own, "trl": own, "plain": torch.float32}.items():
        turns, computed_in = results[name], measure.DTYPES[dtype]
        each = figures(turns, parameters, measure.rate_in(dtype, machine))
        each["ours_is_faster"] = measure.faster_by(results["ours"], turns)
        each["loss_difference"] = loss_difference(results["ours"], turns)
        summary[name] = {"computed_in": computed_in, **each}
        rows.append(
            [name, computed_in, f"{each['pairs_per_second']:.2f}", f"{each['tokens_per_second']:,.0f}",
             f"{each['rate_share']:.2f}", measure.gibibytes(each["peak_memory"]), f"{each['ours_is_faster']:.2f}",
             f"{each['loss_difference']:.4f}"]
        )  # fmt: skip
    measure.print_table(
        [
            *("", "computed in", "pairs/s", "tokens/s", "share of the rate"),
            *("peak memory", "ours is faster by", "loss differs by"),
        ],
        rows,
    )
    if trl_format(own):
        print(f"TRL's default, bf16, would be emulated here: it is compared in {summary['trl']['computed_in']}")
    once = tokens["tokens_shared"] / tokens["tokens"]
    print(
        f"{len(results['ours'])} updates each; a pair has {tokens['tokens']:.0f} tokens, "
        f"{tokens['tokens_shared']:.0f} with the common prefix counted once, "
        f"as ours computes it: {summary['ours']['rate_share'] * once:.2f} of the rate"
    )
    measure.write_figures(options.json, {"machine": machine, **tokens, "summary": summary, "turns": results})


if __name__ == "__main__":
    run_script(main)
