"""TRL's `RewardTrainer` with what this project adds to it: rows named at NaN, every pair counted once, good stops."""

import contextlib
import json
import math
import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow.compute
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from peft import PeftModel
from safetensors import SafetensorError
from torch.distributed.fsdp import MixedPrecisionPolicy
from tqdm.auto import tqdm
from transformers import EvalPrediction, PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import default_logdir
from transformers.trainer_utils import SaveStrategy
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from reward_pipeline.cards import reward_model_card, write_evaluation
from reward_pipeline.files import (
    InputError,
    at_places,
    check_files,
    first_line,
    rounded,
    write_checksums,
    write_text,
)
from reward_pipeline.form import form_differences, form_margins
from reward_pipeline.models import load_reward_model, round_weights, save_tokenizer
from reward_pipeline.pair_metrics import Columns
from reward_pipeline.plots import plot_curves
from reward_pipeline.processes import together
from reward_pipeline.runs import CHECKPOINT_REMEDY
from reward_pipeline.statistics import wins

OWN_SETTINGS = ("reward_max_length", "reward_format", "form_model", "form_term", "author_strengths")  # in the config
ADAPTER = "adapter"  # directory of it, in that of the model
MIN_WARMUP_UPDATES = 20  # shorter runs start at the full learning rate
READ_AT_ONCE = 10_000  # pairs whose tokens are counted
WARM_UPDATES = 3  # the first ones are slower, on a GPU several times; the speed is told by as many after them

# --- the trainer -----------------------------------------------------------------------------------------------------


class PairTrainer(RewardTrainer):
    """`RewardTrainer` that stops at a loss or gradient that is not finite and names the rows.

    Its evaluation keeps the rewards of every pair: each counts once, ties count half.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        # A line that a person reads, with one accuracy in it, instead of TRL's dictionaries.
        for theirs in (PrinterCallback, ProgressCallback):
            self.remove_callback(theirs)
        self.add_callback(Lines if self.args.disable_tqdm else Progress)
        self.add_callback(Checksums)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        places = inputs.pop("place", [])
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if "margin" in inputs and self.model.training:  # TRL's accuracy leaves it out
            chosen, rejected = outputs.logits.detach().squeeze(-1).chunk(2)
            right = (chosen - rejected > inputs["margin"]).float().mean()
            self._metrics["train"]["accuracy"][-1] = self.accelerator.gather_for_metrics(right).mean().item()
        # The same answer in all processes, so that all of them stop.
        if not self.accelerator.gather(loss.detach()).isfinite().all():
            self.refuse("loss", gather_object([] if loss.isfinite() else places))
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # Called before the weights are changed. In fp16 gradients overflow now and then, and such updates are skipped.
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and not math.isfinite(norm) and not self.args.fp16:
            self.refuse("gradient", [])
        return norm

    def refuse(self, figure: str, places: list[str]) -> NoReturn:
        """Stop the run before it spoils the weights.

        Args:
            figure: what is not finite.
            places: of the pairs of the batch concerned.

        Raises:
            InputError: always.
        """
        split, update = "train" if self.model.training else "validation", self.state.global_step + self.model.training
        batch = at_places([f"{split} {place}" for place in places])
        raise InputError(
            f"update {update}: the {figure} is not finite{batch}; "
            "the last checkpoint is kept; start over (--fresh) with a lower --learning_rate or without such pairs"
        )

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        # TRL's own would return one logit an answer, the chosen and the rejected ones of a batch after each other. As
        # (pairs, 2) they can be gathered from uneven batches and processes, and each pair is counted once.
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        chosen, rejected = outputs.logits.detach().float().squeeze(-1).chunk(2)
        # (pairs, 2): chosen, rejected; the loss asks of them a difference of more than the margin
        pairs = torch.stack([chosen - inputs.get("margin", 0.0), rejected], dim=1)
        return loss.detach(), pairs, torch.zeros_like(pairs[:, 0])  # without labels no metrics would be computed

    def _run_epoch(self, *rest: Any, **options: Any) -> None:
        # `transformers` looks whether a run is at its end only after an update: one that goes on there would get one
        # more, and be another model.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*rest, **options)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs and self.state.global_step == self._initial_global_step:
            return  # the figures of a training without an update
        # TRL would overwrite the accuracy of an evaluation with its own: a mean over batches, however uneven they are,
        # in which a tie counts as wrong.
        self._metrics["eval"].pop("accuracy", None)
        super().log(logs, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with named_errors(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with named_errors(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        together(lambda: check_files(self.state.best_model_checkpoint, "--fresh starts over"), first_alone=True)
        super()._load_best_model()

    def create_optimizer(self, *rest: Any) -> Any:
        with refused_settings(ValueError, TypeError, ImportError):
            return super().create_optimizer(*rest)

    def create_scheduler(self, *rest: Any, **options: Any) -> Any:
        with refused_settings(ValueError, TypeError):
            return super().create_scheduler(*rest, **options)

    def competes(self, step: int) -> bool:
        """Whether the evaluation after an update may decide which checkpoint is the best.

        Only what is saved can be loaded again; what is saved because the run was stopped does not count, so that it
        ends as an undisturbed one.
        """
        regular = step % self.args.save_steps == 0 or step >= self.state.max_steps
        return self.args.save_strategy != SaveStrategy.STEPS or regular

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best = self.competes(self.state.global_step) and super()._determine_best_metric(metrics, trial)
        # With `--save_strategy best` the answer decides whether a checkpoint is saved: one that is stopped needs it.
        return best or self.control.should_training_stop


def place_collator(
    pad_token_id: int, pad_to_multiple_of: int | None, form_model: Mapping[str, float] | None = None
) -> Callable[[list[dict[str, Any]]], dict]:
    """TRL's collator, whose batches also say under "place" where their pairs come from.

    Args:
        form_model: what it makes of a pair becomes minus TRL's margin. The loss is then -log sigmoid(r_chosen -
            r_rejected + form margin), a product of experts (arXiv 1909.03683) of which only the reward learns, and so
            learns what form leaves over. None leaves it out.
    """
    collate = DataCollatorForPreference(pad_token_id, pad_to_multiple_of)

    def collate_with_places(examples: list[dict[str, Any]]) -> dict[str, Any]:
        if form_model:  # here and not beforehand, since for a million pairs it takes minutes
            answers = ([each[side] for each in examples] for side in ("chosen", "rejected"))
            margins = form_margins(form_model, form_differences(*answers))
            examples = [{**each, "margin": -margin} for each, margin in zip(examples, margins, strict=True)]
        # Pairs of a stream have no column `row`.
        places = [f"row {each['row'] + 1} ({each['place']})" if "row" in each else each["place"] for each in examples]
        return {**collate(examples), "place": places}

    return collate_with_places


def pair_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of pairs whose chosen answer has the higher reward, ties half; `predictions` is (N, 2)."""
    return {"accuracy": float(wins(prediction.predictions[:, 0], prediction.predictions[:, 1]).mean())}


def keep_rewards_in_fp32(trainer: PairTrainer) -> None:
    """Under FSDP2 let the layers alone compute in a shorter type.

    The policy of `accelerate` would also round the rewards, and the sums of gradients.
    """
    if trainer.accelerator.is_fsdp2 and computing_type(trainer.args) != torch.float32:
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=computing_type(trainer.args), reduce_dtype=torch.float32
        )


@contextlib.contextmanager
def named_errors(checkpoint: str | None) -> Iterator[None]:
    """Let what libraries say of a checkpoint that can not be loaded become an `InputError`."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.distributed.DistError):
        raise  # says nothing of the checkpoint
    except (OSError, ValueError, RuntimeError, KeyError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{checkpoint}: damaged, or of another model ({first_line(error)}); {CHECKPOINT_REMEDY}"
        ) from error


@contextlib.contextmanager
def refused_settings(*kinds: type[Exception]) -> Iterator[None]:
    """Let what libraries say, by errors of these kinds, of settings that they do not take become an `InputError`."""
    try:
        yield
    except kinds as error:
        raise InputError(f"the trainer refuses these settings: {first_line(error)}") from error


# --- what happens beside the updates ---------------------------------------------------------------------------------


class Checksums(TrainerCallback):
    """A checkpoint gets its checksums as soon as all processes have written their parts of it."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            # A pickle with the token of the hub in it, in clear; nothing that goes on from a checkpoint reads it.
            (checkpoint / "training_args.bin").unlink(missing_ok=True)
            write_checksums(checkpoint)


class Watch(TrainerCallback):
    """Ends the training in good order, with a checkpoint, when `stop_requested`; measures the time of updates alone.

    The time goes into the log, and so into the checkpoints: a resumed run continues to count.
    """

    def __init__(self, stop_requested: Callable[[], bool]):
        self.stop_requested, self.interrupted = stop_requested, False
        self.seconds, self.updates, self.started = 0.0, 0, 0.0
        self.updates_of_this_start, self.warm_seconds = 0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for entry in state.log_history:
            if "update_seconds" in entry:
                self.seconds, self.updates = entry["update_seconds"], entry["step"]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self.started
        self.updates += 1
        self.updates_of_this_start += 1
        left = state.max_steps - state.global_step
        if self.updates_of_this_start == WARM_UPDATES:
            self.warm_seconds = self.seconds
        if self.updates_of_this_start == 2 * WARM_UPDATES and left and state.is_world_process_zero:
            expected = duration(left * (self.seconds - self.warm_seconds) / WARM_UPDATES)
            tqdm.write(f"expected       {expected} for the other {left:,} updates, evaluations not counted")
        if self.stop_requested():
            self.interrupted = control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.interrupted and state.global_step < state.max_steps and not state.epoch.is_integer():
            # Not the end of one: what an undisturbed run would not evaluate.
            control.should_evaluate = control.should_save = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            state.log_history[-1]["update_seconds"] = self.seconds


class Lines(TrainerCallback):
    """The log as lines."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and (line := log_line(logs, state.global_step, state.max_steps)):
            tqdm.write(line)


class Progress(Lines, ProgressCallback):
    """The log as lines above the bars of `transformers`."""


def log_line(logs: dict[str, float], update: int, updates: int) -> str:
    """What was measured over the last updates, or by an evaluation; empty for other entries of a log."""
    prefix = "eval_" if "eval_loss" in logs else ""
    if f"{prefix}loss" not in logs:
        return ""
    shown = [("loss", ".4f"), ("accuracy", ".3f"), ("margin", "+.3f"), ("learning_rate", ".2e"), ("grad_norm", ".2f")]
    figures = [
        f"{name.replace('_', ' ')} {float(logs[prefix + name]):{form}}" for name, form in shown if prefix + name in logs
    ]
    return f"update {update:,}/{updates:,}  {'validation  ' if prefix else ''}{'  '.join(figures)}"


def duration(seconds: float) -> str:
    """Seconds in words, to the minute from one on."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


# --- the length and the rhythm of a run ------------------------------------------------------------------------------


def share_update(config: RewardConfig, batch: int, accumulation: int) -> None:
    """Divide the pairs of an update among the processes, so that their number does not change the result.

    Only as long as both batch settings are at their constants: other values count per process, as everywhere in TRL.

    Args:
        batch, accumulation: the constants, pairs per step and steps per update of one process.

    Raises:
        InputError: the pairs can not be divided.
    """
    if (config.per_device_train_batch_size, config.gradient_accumulation_steps) != (batch, accumulation):
        return
    mine, rest = divmod(batch * accumulation, config.world_size)
    if rest:
        raise InputError(
            f"the {batch * accumulation} pairs of an update can not be divided among {config.world_size} processes; "
            "give --per_device_train_batch_size and --gradient_accumulation_steps, which then count per process"
        )
    config.per_device_train_batch_size = math.gcd(batch, mine)
    config.gradient_accumulation_steps = mine // config.per_device_train_batch_size


def pairs_per_update(config: RewardConfig) -> int:
    """Pairs of all processes together."""
    return config.train_batch_size * config.gradient_accumulation_steps * config.world_size


def fit_rhythm(config: RewardConfig, pairs: int, usual_warmup: float) -> int:
    """Scale logging, evaluation and saving to the length of the run; returns its number of updates.

    Steps below 1 are shares of the run, as everywhere in `transformers`.

    Args:
        pairs: to train on; of no matter with `max_steps`.
        usual_warmup: the constant; a short run leaves it out, but not what the user asked for.
    """
    batches = math.ceil(pairs / (config.train_batch_size * config.world_size))
    updates_per_epoch = max(math.ceil(batches / config.gradient_accumulation_steps), 1)
    updates = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * updates_per_epoch)

    def steps(value: float, longest: int) -> int:
        return max(min(math.ceil(value * updates) if value < 1 else int(value), longest), 1)

    config.logging_steps = steps(config.logging_steps, updates // 10)
    config.eval_steps = steps(config.eval_steps or config.logging_steps, updates // 2)
    config.save_steps = steps(config.save_steps, updates)
    if config.load_best_model_at_end:  # then every checkpoint needs its accuracy
        config.save_steps = config.eval_steps * max(config.save_steps // config.eval_steps, 1)
    if updates < MIN_WARMUP_UPDATES and config.warmup_steps == usual_warmup < 1:  # a share, which was nobody's wish
        config.warmup_steps = 0  # the first update of a warm-up has learning rate 0
    return updates


def computing_type(config: RewardConfig) -> torch.dtype:
    """What the linear layers are computed in."""
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32


def numbered(pairs: Dataset) -> Dataset:
    """The pairs with their numbers, which `place_collator` names."""
    return pairs.add_column("row", np.arange(len(pairs)))


def tokens_of(pairs: Dataset) -> int:
    """Tokens of both conversations of all pairs; read as Arrow, where a million pairs take seconds."""
    names = ["chosen_ids", "rejected_ids"]
    tables = pairs.select_columns(names).with_format("arrow").iter(READ_AT_ONCE)
    return sum(
        pyarrow.compute.sum(pyarrow.compute.list_value_length(table[name])).as_py()
        for table in tables
        for name in names
    )


# --- what a run leaves -----------------------------------------------------------------------------------------------


def save_trained(trainer: PairTrainer, base: str, directory: Path) -> None:
    """Save the model as it was computed with, as one whole model; all processes take their part.

    Args:
        base: directory of the base model.
    """
    lora = isinstance(trainer.model, PeftModel)
    if not lora:
        round_weights(trainer.model, computing_type(trainer.args))
    trainer.save_model(str(directory))
    if trainer.is_world_process_zero():
        if lora:
            save_merged(trainer, base, directory)
        save_tokenizer(trainer.processing_class, directory, trainer.model)
        (directory / "training_args.bin").unlink(missing_ok=True)  # a pickle, and all in settings.json anyway
    trainer.accelerator.wait_for_everyone()


def save_merged(trainer: PairTrainer, base: str, directory: Path) -> None:
    """Turn the adapter that was saved in `directory` into a whole model: base weights plus LoRA, and the trained head.

    The adapter itself goes to `ADAPTER` in it.

    From a freshly loaded base model, so that it also works where the trained one is spread over several processes.
    """
    fresh = load_reward_model(base, trainer.processing_class.pad_token_id, trainer.args.seed)
    fresh.config.update({name: getattr(trainer.model.config, name) for name in OWN_SETTINGS})
    merged = PeftModel.from_pretrained(fresh, directory).merge_and_unload()
    round_weights(merged, computing_type(trainer.args))
    (directory / ADAPTER).mkdir()
    for adapter in directory.glob("adapter_*"):
        adapter.rename(directory / ADAPTER / adapter.name)
    merged.save_pretrained(directory)


def keep_logs(trainer: PairTrainer, output: Path) -> None:
    """Let TensorBoard write into `output`, a directory a start, and not beside checkpoints, which a run may replace."""
    for each in trainer.callback_handler.callbacks:
        if isinstance(each, TensorBoardCallback) and each.logging_dir is None:
            each.logging_dir = str(output / default_logdir())


def tell_trackers(trainer: PairTrainer, metrics: dict[str, Any]) -> None:
    """Let TensorBoard, wandb and their like know the final figures too, as `final/accuracy`."""
    figures = {f"final/{name}": value for name, value in metrics.items() if isinstance(value, int | float)}
    trainer.callback_handler.on_log(trainer.args, trainer.state, trainer.control, figures)


def finish_adapter(directory: Path, settings: dict[str, Any]) -> None:
    """Complete the adapter of a LoRA training, if it is to be kept: `--keep_adapter`.

    It gets the base model's name in place of a path of this machine, and what the evaluator takes from a config.
    """
    adapter = directory / ADAPTER
    if not settings["keep_adapter"]:
        shutil.rmtree(adapter, ignore_errors=True)
    if not adapter.is_dir():
        return
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": settings["model"]}
    write_text(path, json.dumps(config, indent=2) + "\n")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (directory / name).is_file():
            shutil.copy(directory / name, adapter)
    for name in ("README.md", "training_args.bin"):  # of PEFT, without a word on this training
        (adapter / name).unlink(missing_ok=True)


def run_figures(trainer: PairTrainer, watch: Watch) -> dict[str, Any]:
    """What the training did and how fast."""
    config, state = trainer.args, trainer.state
    evaluated = {entry["step"] for entry in state.log_history if "eval_accuracy" in entry}
    candidates = sum(map(trainer.competes, evaluated))
    best = state.best_model_checkpoint if config.load_best_model_at_end else None
    size = pairs_per_update(config)
    seen, streamed = state.global_step * size, isinstance(trainer.train_dataset, IterableDataset)
    return {
        "train_pairs": seen if streamed else min(seen, len(trainer.train_dataset)),
        "train_pairs_per_second": watch.updates * size / watch.seconds if watch.seconds else None,
        "train_seconds": watch.seconds,
        "updates": state.global_step,
        "pairs_per_update": size,
        "candidates": candidates if config.load_best_model_at_end else 1,
        "best_checkpoint": Path(best).name if best else None,
        "device": f"{config.device.type} ({str(computing_type(config)).removeprefix('torch.')})",
    }


def write_reward_model(
    directory: Path,
    columns: Columns,
    metrics: dict[str, Any],
    settings: dict[str, Any],
    metadata: dict[str, Any],
    log: list[dict[str, Any]],
) -> None:
    """Complete a saved model with its figures, settings, log, plots and card.

    Args:
        columns, metrics: of the validation split, and the training's own figures.
        settings: resolved settings of the run.
        metadata: of the processed data.
        log: the trainer's history.
    """
    plots = write_evaluation(columns, metrics, directory)
    baselines = {"longer wins": metrics["longer_wins"], "form model": metrics["form_wins"]}
    plot_curves(log, baselines, directory / "plots" / "training_curves.png")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    # For `normalize=True`; without a prefix for the `normalize_reward` of OpenRLHF.
    for prefix, figures in (("reward_", metrics), ("reward_with_form_", metrics["with_form"]), ("", metrics)):
        config |= {f"{prefix}{name}": figures[f"reward_{name}"] for name in ("mean", "std") if figures}
    contents = {"config": config, "metrics": rounded(metrics), "settings": settings, "training_log": log}
    for name, content in contents.items():
        write_text(directory / f"{name}.json", json.dumps(content, indent=2, default=str) + "\n")
    finish_adapter(directory, settings)
    write_text(directory / "README.md", reward_model_card(metrics, settings, metadata, ["training_curves.png", *plots]))
    write_checksums(directory)
