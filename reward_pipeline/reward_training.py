"""TRL's `RewardTrainer` with what this project adds to it."""

import contextlib
import math
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import gather_object
from datasets import IterableDataset
from peft import PeftModel
from safetensors import SafetensorError
from transformers import EvalPrediction, TrainerCallback
from transformers.trainer_utils import SaveStrategy
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from reward_pipeline.files import InputError, check_files, first_line, named, write_checksums
from reward_pipeline.models import ModelSource, load_reward_model, round_weights
from reward_pipeline.processes import together
from reward_pipeline.runs import CHECKPOINT_REMEDY
from reward_pipeline.statistics import wins

MIN_WARMUP_UPDATES = 20  # shorter runs start at the full learning rate


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


class PlaceCollator(DataCollatorForPreference):
    """TRL's collator; a batch also says where its pairs come from. Those of a stream have no column `row`."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        places = [
            f"row {example['row'] + 1} ({example['place']})" if "row" in example else example["place"]
            for example in examples
        ]
        return {**super().torch_call(examples), "place": places}


class PairTrainer(RewardTrainer):
    """`RewardTrainer` that stops at a loss or gradient that is not finite and names the rows.

    Its evaluation keeps the rewards of every pair: each counts once, ties count half.
    """

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "place" not in self._signature_columns:
            self._signature_columns += ["row", "place"]  # would be dropped before the collator sees them

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        places = inputs.pop("place", [])
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        # The same answer in all processes, so that all of them stop.
        if not self.accelerator.gather(loss.detach()).isfinite().all():
            self.refuse("loss", gather_object([] if loss.isfinite() else places))
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model, grad_norm=None):
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
        batch = named([f"{split} {place}" for place in places])
        raise InputError(
            f"update {update}: the {figure} is not finite{batch}; "
            "the last checkpoint is kept; start over (--fresh) with a lower --learning_rate or without such pairs"
        )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        rewards = outputs.logits.detach().float().squeeze(-1).chunk(2)
        pairs = torch.stack(rewards, dim=1)  # (pairs, 2): chosen, rejected
        return loss.detach(), pairs, torch.zeros_like(pairs[:, 0])  # without labels no metrics would be computed

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            write_checksums(Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with named_errors(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with named_errors(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self):
        together(lambda: check_files(self.state.best_model_checkpoint, "--fresh starts over"), first_alone=True)
        super()._load_best_model()

    def create_optimizer(self, *rest):
        with refused_settings(ValueError, TypeError, ImportError):
            return super().create_optimizer(*rest)

    def create_scheduler(self, *rest, **options):
        with refused_settings(ValueError, TypeError):
            return super().create_scheduler(*rest, **options)

    def competes(self, step: int) -> bool:
        """Whether the evaluation after an update may decide which checkpoint is the best.

        Only what is saved can be loaded again; what is saved because the run was stopped does not count, so that it
        ends as an undisturbed one.
        """
        regular = step % self.args.save_steps == 0 or step >= self.state.max_steps
        return self.args.save_strategy != SaveStrategy.STEPS or regular

    def _determine_best_metric(self, metrics, trial):
        best = self.competes(self.state.global_step) and super()._determine_best_metric(metrics, trial)
        # With `--save_strategy best` the answer decides whether a checkpoint is saved: one that is stopped needs it.
        return best or self.control.should_training_stop


def pair_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of pairs whose chosen answer has the higher reward, ties half; `predictions` is (N, 2)."""
    return {"pair_accuracy": float(wins(prediction.predictions[:, 0], prediction.predictions[:, 1]).mean())}


class Watch(TrainerCallback):
    """Ends the training in good order, with a checkpoint, when `stop_requested`; measures the time of updates alone.

    The time goes into the log, and so into the checkpoints: a resumed run continues to count.
    """

    def __init__(self, stop_requested: Callable[[], bool]):
        self.stop_requested, self.interrupted = stop_requested, False
        self.seconds, self.updates, self.started = 0.0, 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        for entry in state.log_history:
            if "update_seconds" in entry:
                self.seconds, self.updates = entry["update_seconds"], entry["step"]

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.started
        self.updates += 1
        if self.stop_requested():
            self.interrupted = control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.interrupted and state.global_step < state.max_steps and not state.epoch.is_integer():
            # Not the end of one: what an undisturbed run would not evaluate.
            control.should_evaluate = control.should_save = False

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            state.log_history[-1]["update_seconds"] = self.seconds


def share_update(config: RewardConfig) -> None:
    """Divide the pairs of an update among the processes, so that their number does not change the result.

    Only as long as both batch settings are at their constants: other values count per process, as everywhere in TRL.

    Raises:
        InputError: the pairs can not be divided.
    """
    batch, accumulation = PER_DEVICE_TRAIN_BATCH_SIZE, GRADIENT_ACCUMULATION_STEPS
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


def fit_rhythm(config: RewardConfig, pairs: int) -> int:
    """Scale logging, evaluation and saving to the length of the run; returns its number of updates.

    Steps below 1 are shares of the run, as everywhere in `transformers`.
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
    if updates < MIN_WARMUP_UPDATES and config.warmup_steps == WARMUP_STEPS:
        config.warmup_steps = 0  # the first update of a warm-up has learning rate 0
    return updates


def run_figures(trainer: PairTrainer, watch: Watch) -> dict[str, Any]:
    """What the training did and how fast."""
    config, state = trainer.args, trainer.state
    evaluated = {entry["step"] for entry in state.log_history if "eval_pair_accuracy" in entry}
    candidates = sum(map(trainer.competes, evaluated))
    best = state.best_model_checkpoint if config.load_best_model_at_end else None
    pairs_per_update = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
    seen = state.global_step * pairs_per_update
    return {
        "train_pairs": seen if isinstance(trainer.train_dataset, IterableDataset) else len(trainer.train_dataset),
        "train_pairs_per_second": watch.updates * pairs_per_update / watch.seconds if watch.seconds else None,
        "train_seconds": watch.seconds,
        "updates": state.global_step,
        "pairs_per_update": pairs_per_update,
        "candidates": candidates if config.load_best_model_at_end else 1,
        "best_checkpoint": Path(best).name if best else None,
        "device": f"{DEVICE.type} ({str(computing_type(config)).removeprefix('torch.')})",
    }


def save_merged(trainer: PairTrainer, source: ModelSource, directory: Path) -> None:
    """Turn the adapter that was saved in `directory` into a whole model: base weights plus LoRA, and the trained head.

    From a freshly loaded base model, so that it also works where the trained one is spread over several processes.
    """
    base = load_reward_model(source.path, trainer.processing_class.pad_token_id, trainer.args.seed)
    base.config.reward_max_length = trainer.model.config.reward_max_length
    merged = PeftModel.from_pretrained(base, directory).merge_and_unload()
    round_weights(merged, computing_type(trainer.args))
    for adapter in directory.glob("adapter_*"):
        adapter.unlink()
    merged.save_pretrained(directory)


def computing_type(config: RewardConfig) -> torch.dtype:
    """What the linear layers are computed in."""
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32
