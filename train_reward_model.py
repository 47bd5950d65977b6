"""Train the reward model: one label, Bradley-Terry loss, TRL's `RewardTrainer`.

In:  `processed_helpsteer/` from `load_helpsteer_dataset.py`, and a base model.
Out: `reward_model_output/`: model and tokenizer, `metrics.json`, `settings.json`, `training_log.json`, `plots/`,
     `README.md` (model card), `checkpoints/`.

    python train_reward_model.py
    python train_reward_model.py --learning_rate 2e-5 --num_train_epochs 2 --output_dir other_output
    accelerate launch train_reward_model.py

Every field of `trl.RewardConfig` is a flag. A stopped run goes on by the same command; `--fresh` starts over.
"""

import hashlib
import json
import math
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from transformers import EvalPrediction, TrainerCallback
from transformers.trainer_utils import SaveStrategy
from trl import RewardConfig, RewardTrainer, TrlParser

from evaluate_reward_model import evaluate_pairs, summary, wins
from load_helpsteer_dataset import OUTPUT_DIR as DATA_DIR
from load_helpsteer_dataset import draw
from load_smollm_model import (
    MODEL_NAME,
    InputError,
    autocast_dtype,
    keep_freed_memory,
    load_reward_model,
    load_tokenizer,
    pick_device,
    replace_directory,
    resolve_model,
    run_script,
    write_text,
)
from reward_model_demo import MODEL_PATH, RewardModelEvaluator

DEVICE = pick_device()
ON_MPS = DEVICE.type == "mps"

# ---------------------------------------------------------------------------------------------------------------------
# data
MAX_TRAIN_SAMPLES = None  # pairs, drawn at random; None takes all
MAX_EVAL_SAMPLES = 400  # pairs for the evaluations during training; the last one takes the whole validation split
# optimisation
LEARNING_RATE = 5e-5  # peak
NUM_TRAIN_EPOCHS = 1  # passes over the training pairs
BATCH_SIZE = 1 if ON_MPS else 4  # pairs per step and device
GRADIENT_ACCUMULATION_STEPS = 8 if ON_MPS else 2  # steps per update: 8 pairs an update and device
WARMUP_SHARE = 0.05  # of all updates
LR_SCHEDULER = "linear"  # decay to 0 after the warm-up
WEIGHT_DECAY = 0.0  # AdamW
MAX_GRAD_NORM = 1.0  # gradient clipping
DROPOUT = 0.0  # in attention
# loss
CENTER_REWARDS_COEFFICIENT = 0.01  # weight of (r_chosen + r_rejected)^2, arXiv 2312.09244
# rhythm, in updates; scaled down when a run has fewer of them
LOGGING_STEPS = 50
EVAL_STEPS = 100
SAVE_STEPS = 200
SAVE_TOTAL_LIMIT = 2  # checkpoints kept, the best one among them
SEED = 42
# ---------------------------------------------------------------------------------------------------------------------

# Settings under which a checkpoint can be continued to the result of an uninterrupted run.
TRAJECTORY = (
    *("model", "data", "dropout", "max_train_samples", "seed", "bf16", "fp16", "optim"),
    *("learning_rate", "num_train_epochs", "max_steps", "warmup_steps", "lr_scheduler_type", "weight_decay"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "center_rewards_coefficient"),
)


@dataclass
class ScriptArguments:
    """What this script adds to the fields of `RewardConfig`."""

    model: str = field(default=MODEL_NAME, metadata={"help": "base model: hub id or local directory"})
    data: str = field(default=DATA_DIR, metadata={"help": "directory written by load_helpsteer_dataset.py"})
    max_train_samples: int | None = field(default=MAX_TRAIN_SAMPLES, metadata={"help": "pairs, drawn at random"})
    max_eval_samples: int = field(default=MAX_EVAL_SAMPLES, metadata={"help": "pairs per evaluation in training"})
    dropout: float = field(default=DROPOUT, metadata={"help": "dropout in attention"})
    fresh: bool = field(default=False, metadata={"help": "start over instead of resuming"})


def default_config() -> dict[str, Any]:
    """The constants above under their names in `RewardConfig`."""
    dtype = autocast_dtype(DEVICE)
    return {
        "output_dir": MODEL_PATH,
        "learning_rate": LEARNING_RATE,
        "num_train_epochs": NUM_TRAIN_EPOCHS,
        "per_device_train_batch_size": BATCH_SIZE,
        "per_device_eval_batch_size": 2 * BATCH_SIZE,
        "gradient_accumulation_steps": GRADIENT_ACCUMULATION_STEPS,
        "warmup_steps": WARMUP_SHARE,
        "lr_scheduler_type": LR_SCHEDULER,
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": MAX_GRAD_NORM,
        "center_rewards_coefficient": CENTER_REWARDS_COEFFICIENT,
        "logging_steps": LOGGING_STEPS,
        "eval_strategy": "steps",
        "eval_steps": EVAL_STEPS,
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS,
        "save_total_limit": SAVE_TOTAL_LIMIT,
        "load_best_model_at_end": True,
        "metric_for_best_model": "pair_accuracy",
        "greater_is_better": True,
        "seed": SEED,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "gradient_checkpointing": False,  # 135 M parameters do not need it
        "disable_dropout": False,  # decided by --dropout alone
        "pad_to_multiple_of": 64 if ON_MPS else None,  # fewer shapes: the MPS allocator keeps a cache for each
        "max_length": None,  # lengths are settled in the data; TRL would drop long pairs
        "report_to": "none",
        "use_cpu": DEVICE.type == "cpu",
    }


class PairTrainer(RewardTrainer):
    """`RewardTrainer` whose evaluation keeps the rewards of every pair: each counts once, ties count half."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        rewards = outputs.logits.detach().float().squeeze(-1).chunk(2)
        pairs = torch.stack(rewards, dim=1)  # (pairs, 2): chosen, rejected
        return loss.detach(), pairs, torch.zeros_like(pairs[:, 0])  # without labels no metrics would be computed

    def _determine_best_metric(self, metrics, trial):
        # Only what is saved can be loaded again: evaluations between two checkpoints do not compete for the best.
        if not self.control.should_save and self.args.save_strategy != SaveStrategy.BEST:
            return False
        return super()._determine_best_metric(metrics, trial)


def pair_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of pairs whose chosen answer has the higher reward, ties half; `predictions` is (N, 2)."""
    return {"pair_accuracy": float(wins(prediction.predictions[:, 0], prediction.predictions[:, 1]).mean())}


class Watch(TrainerCallback):
    """Turns Ctrl-C into an orderly stop with a checkpoint, and measures the time spent in updates alone.

    The time goes into the log, and so into the checkpoints: a resumed run continues to count.
    """

    def __init__(self):
        self.interrupted, self.seconds, self.updates, self.started = False, 0.0, 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous = signal.signal(signal.SIGINT, self.interrupt)
        for entry in state.log_history:
            if "update_seconds" in entry:
                self.seconds, self.updates = entry["update_seconds"], entry["step"]

    def interrupt(self, number, frame):
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        print("\nStopping after this update; Ctrl-C again to stop at once.", file=sys.stderr)

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.started
        self.updates += 1
        if self.interrupted:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            state.log_history[-1]["update_seconds"] = self.seconds

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGINT, self.previous)


# --- settings --------------------------------------------------------------------------------------------------------


def parse_settings(arguments: list[str] | None = None) -> tuple[ScriptArguments, RewardConfig]:
    """Flags over constants; an unknown flag or a bad value ends with a usage line."""
    parser = TrlParser((ScriptArguments, RewardConfig), description=__doc__.splitlines()[0])
    parser.set_defaults(**default_config())
    try:
        script, config = parser.parse_args_and_config(arguments)
    except ValueError as error:
        parser.exit(2, f"error: {' '.join(str(error).split())}\n")
    if script.max_eval_samples < 1 or (script.max_train_samples is not None and script.max_train_samples < 1):
        parser.error("--max_train_samples and --max_eval_samples must be at least 1")
    return script, config


def fit_rhythm(config: RewardConfig, pairs: int) -> int:
    """Scale logging, evaluation and saving to the length of the run; returns its number of updates."""
    batches = math.ceil(pairs / (config.per_device_train_batch_size * config.world_size))
    updates_per_epoch = max(math.ceil(batches / config.gradient_accumulation_steps), 1)
    updates = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * updates_per_epoch)
    config.logging_steps = int(min(config.logging_steps, max(updates // 10, 1)))
    config.eval_steps = int(min(config.eval_steps, max(updates // 2, 1)))
    # A multiple of the evaluations, so that every checkpoint has its accuracy.
    config.save_steps = config.eval_steps * max(int(min(config.save_steps, updates)) // config.eval_steps, 1)
    return updates


def load_data(directory: str) -> tuple[DatasetDict, dict[str, Any]]:
    """Splits and metadata as `load_helpsteer_dataset.py` wrote them.

    Raises:
        InputError: nothing there, or not complete.
    """
    try:
        metadata = json.loads((Path(directory) / "metadata.json").read_text(encoding="utf-8"))
        return load_from_disk(directory), metadata
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{directory}: no complete dataset here; run load_helpsteer_dataset.py first") from error


def run_settings(
    script: ScriptArguments, config: RewardConfig, metadata: dict[str, Any], origin: str
) -> dict[str, Any]:
    """All resolved settings, with a hash that identifies the data."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()[:16]
    return {**config.to_dict(), **vars(script), "data": f"{script.data} {digest}", "base_model": origin}


def prepare_checkpoints(checkpoints: Path, settings: dict[str, Any], fresh: bool) -> None:
    """Keep the checkpoints of a run with these settings; otherwise begin with an empty directory.

    Raises:
        InputError: the checkpoints there belong to an unfinished run with other settings.
    """
    saved = checkpoints / "settings.json"
    if saved.is_file() and last_checkpoint(checkpoints) and not fresh:
        before, now = json.loads(saved.read_text(encoding="utf-8")), json.loads(json.dumps(settings, default=str))
        changed = [name for name in TRAJECTORY if before.get(name) != now.get(name)]
        if not changed:
            return
        if not (checkpoints / "finished").exists():
            changes = ", ".join(f"{name} {before.get(name)} -> {now.get(name)}" for name in changed)
            raise InputError(
                f"{checkpoints}: holds an unfinished run with other settings ({changes}); "
                "--fresh starts over, another --output_dir keeps both"
            )
    with replace_directory(checkpoints) as directory:
        write_text(directory / "settings.json", json.dumps(settings, indent=2, default=str) + "\n")


def last_checkpoint(checkpoints: Path) -> str | None:
    """The complete checkpoint with the most updates, if any."""
    complete = [path for path in checkpoints.glob("checkpoint-*") if is_complete(path)]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end; the trainer writes its state last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return any(checkpoint.glob("*.safetensors")) and (checkpoint / "scheduler.pt").is_file()


# --- results ---------------------------------------------------------------------------------------------------------


def plot_curves(history: list[dict[str, float]], path: Path) -> None:
    """Loss, validation accuracy, learning rate and gradient norm against updates."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "loss": {"loss": "train", "eval_loss": "validation"},
        "accuracy": {"accuracy": "train", "eval_pair_accuracy": "validation"},
        "learning rate": {"learning_rate": "learning rate"},
        "gradient norm": {"grad_norm": "before clipping"},
    }
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), layout="constrained")
    for axis, (title, series) in zip(axes.flat, panels.items(), strict=True):
        for key, label in series.items():
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            axis.plot(*zip(*points, strict=True) if points else ((), ()), marker=".", label=label)
        axis.set(title=title, xlabel="updates")
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def model_card(metrics: dict[str, Any], settings: dict[str, Any], metadata: dict[str, Any]) -> str:
    """README.md of the trained model: numbers first, then how they came about and how to use it."""
    low, high = metrics["accuracy_interval"]
    shorter = metrics["shorter_chosen"]
    return f"""---
library_name: transformers
pipeline_tag: text-classification
tags: [reward-model, trl, reward-trainer]
---
# Reward model

A one-label sequence classifier that scores how good an answer to a prompt is. Higher is better; only differences
between answers to one prompt have a meaning.

| on the validation split | |
|---|---|
| pairs (unseen prompts) | {metrics["n"]:,} |
| accuracy, ties half | **{metrics["accuracy"]:.3f}** (95 % interval {low:.3f} to {high:.3f}) |
| baseline: the longer answer wins | {metrics["longer_wins"]:.3f} |
| accuracy where the chosen answer is the shorter one | {shorter["accuracy"]} (n = {shorter["n"]:,}) |
| mean margin | {metrics["mean_margin"]:.3f} |
| reward mean, standard deviation | {metrics["reward_mean"]:.3f}, {metrics["reward_std"]:.3f} |

The weights are those of the best of {metrics["evaluations"]} evaluations on up to
{settings["max_eval_samples"]} of these pairs, so the accuracy is slightly optimistic.

![training curves](plots/training_curves.png)

## Origin
- base model: {settings["base_model"]}
- data: {metadata["source"]}; {metrics["train_pairs"]:,} training pairs of at most {metadata["max_length"]} tokens
- {metrics["updates"]:,} updates of {metrics["pairs_per_update"]} pairs, learning rate {settings["learning_rate"]},
  {settings["num_train_epochs"]} epoch(s), centering {settings["center_rewards_coefficient"]}, seed {settings["seed"]};
  all settings in `settings.json`
- {metrics["train_seconds"]:,.0f} s in updates on {metrics["device"]}: {metrics["train_pairs_per_second"]:.2f} pairs/s

## Use
```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForSequenceClassification.from_pretrained(".")
messages = [{{"role": "user", "content": "What is 2 + 2?"}}, {{"role": "assistant", "content": "4"}}]
inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
print(model(**inputs).logits.item())
```

## Limits
Reads {metadata["max_length"]} tokens: of a longer answer only the beginning counts, of a longer prompt start and end.
A small model: expect it to notice form, topic and language before facts.
"""


def publish(staging: Path, output: Path) -> None:
    """Move finished files into place; `config.json` goes first and comes last, since nothing reads a model without."""
    (output / "config.json").unlink(missing_ok=True)
    for item in sorted(staging.iterdir(), key=lambda item: item.name == "config.json"):
        if item.is_dir():
            shutil.rmtree(output / item.name, ignore_errors=True)
        item.replace(output / item.name)


# --- the stages, in order --------------------------------------------------------------------------------------------


def build_trainer(
    script: ScriptArguments, config: RewardConfig, splits: DatasetDict, max_length: int
) -> tuple[PairTrainer, str]:
    """Trainer over the drawn pairs with a fresh reward model, and in words where its base model came from."""
    if DEVICE.type == "cpu":
        keep_freed_memory()
    train_pairs = splits["train"].select(draw(len(splits["train"]), script.max_train_samples, config.seed))
    eval_pairs = splits["validation"].select(draw(len(splits["validation"]), script.max_eval_samples, config.seed))
    fit_rhythm(config, len(train_pairs))
    with config.main_process_first(desc="finding the model"):
        source = resolve_model(script.model)
    tokenizer = load_tokenizer(source.path)
    model = load_reward_model(source.path, tokenizer.pad_token_id, config.seed, script.dropout)
    model.config.reward_max_length = max_length
    trainer = PairTrainer(
        model=model,
        args=config,
        train_dataset=train_pairs,
        eval_dataset=eval_pairs,
        processing_class=tokenizer,
        compute_metrics=pair_accuracy,
    )
    return trainer, source.origin


def train(trainer: PairTrainer, settings: dict[str, Any], fresh: bool) -> Watch:
    """Run or resume the training; ends the process with exit code 130 when it was interrupted."""
    checkpoints, first = Path(trainer.args.output_dir), trainer.is_world_process_zero()
    if first:
        prepare_checkpoints(checkpoints, settings, fresh)
    trainer.accelerator.wait_for_everyone()
    checkpoint = trainer.args.resume_from_checkpoint or last_checkpoint(checkpoints)
    if checkpoint and first:
        print(f"Resuming from {checkpoint} (--fresh starts over).")
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=checkpoint)
    step, last = trainer.state.global_step, trainer.state.max_steps
    if watch.interrupted and step < last:
        if first:
            print(
                f"Stopped at update {step} of {last}, checkpoint saved. The same command goes on; --fresh starts over."
            )
        sys.exit(130)
    return watch


def run_figures(trainer: PairTrainer, watch: Watch) -> dict[str, Any]:
    """What the training did and how fast."""
    config, state = trainer.args, trainer.state
    pairs_per_update = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
    return {
        "train_pairs": len(trainer.train_dataset),
        "train_pairs_per_second": watch.updates * pairs_per_update / watch.seconds,
        "train_seconds": watch.seconds,
        "updates": state.global_step,
        "pairs_per_update": pairs_per_update,
        "evaluations": sum("eval_pair_accuracy" in entry for entry in state.log_history),
        "best_checkpoint": Path(state.best_model_checkpoint or "").name or None,
        "device": f"{DEVICE.type} ({'bf16' if config.bf16 else 'fp16' if config.fp16 else 'fp32'})",
    }


def write_results(staging: Path, metrics: dict[str, Any], settings: dict, metadata: dict, log: list[dict]) -> None:
    """Complete a saved model with its figures, settings, log, plots and card."""
    (staging / "training_args.bin").unlink(missing_ok=True)  # a pickle, and all in settings.json anyway
    (staging / "plots").mkdir()
    plot_curves(log, staging / "plots" / "training_curves.png")
    config = json.loads((staging / "config.json").read_text(encoding="utf-8"))
    config |= {name: metrics[name] for name in ("reward_mean", "reward_std")}
    for name, content in {"config": config, "metrics": metrics, "settings": settings, "training_log": log}.items():
        write_text(staging / f"{name}.json", json.dumps(content, indent=2, default=str) + "\n")
    write_text(staging / "README.md", model_card(metrics, settings, metadata))


def finish(
    trainer: PairTrainer, watch: Watch, validation: Dataset, settings: dict, metadata: dict, output: Path
) -> dict[str, Any] | None:
    """Save, evaluate what was saved on the whole validation split, publish; the first process returns the metrics."""
    staging = output / ".new"
    if trainer.is_world_process_zero():
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(staging))
    if not trainer.is_world_process_zero():
        return None
    try:
        evaluator = RewardModelEvaluator(staging, mixed_precision=True)
        results = evaluate_pairs(evaluator, validation["prompt"], validation["chosen"], validation["rejected"])
        metrics = {**results, "source": metadata["source"], **run_figures(trainer, watch)}
        write_results(staging, metrics, settings, metadata, trainer.state.log_history)
        publish(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return metrics


def report(metrics: dict[str, Any], output: Path) -> str:
    """The result in one line."""
    speed = f"{metrics['train_seconds']:.0f} s in updates, {metrics['train_pairs_per_second']:.2f} pairs/s"
    return f"{summary(metrics)}; {speed}; written to {output}/"


def main() -> None:
    script, config = parse_settings()
    splits, metadata = load_data(script.data)
    output = Path(config.output_dir)
    config.output_dir = str(output / "checkpoints")
    trainer, origin = build_trainer(script, config, splits, metadata["max_length"])
    settings = run_settings(script, config, metadata, origin)
    watch = train(trainer, settings, script.fresh)
    metrics = finish(trainer, watch, splits["validation"], settings, metadata, output)
    if metrics:
        (output / "checkpoints" / "finished").touch()
        print(report(metrics, output))


if __name__ == "__main__":
    run_script(main)
