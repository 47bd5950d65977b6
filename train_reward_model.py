"""Train the reward model: one label, Bradley-Terry loss, TRL's `RewardTrainer`.

In:  `processed_helpsteer/` from `load_helpsteer_dataset.py`, and a base model.
Out: `reward_model_output/`: model and tokenizer, `metrics.json`, `rewards.csv`, `settings.json`, `training_log.json`,
     `plots/`, `README.md` (model card), `checkpoints/`.

    python train_reward_model.py
    python train_reward_model.py --learning_rate 2e-5 --num_train_epochs 2 --output_dir other_output
    python train_reward_model.py --use_peft --learning_rate 5e-4
    python train_reward_model.py --streaming hub/dataset --max_steps 10000
    accelerate launch train_reward_model.py

Every field of `trl.RewardConfig` is a flag, and so are TRL's for LoRA. A stopped run goes on by the same command;
`--fresh` starts over.
"""

import contextlib
import json
import math
import pickle
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from matplotlib.figure import Figure
from peft import PeftModel
from safetensors import SafetensorError
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import EvalPrediction, TrainerCallback
from transformers.trainer_utils import SaveStrategy
from trl import ModelConfig, RewardConfig, RewardTrainer, TrlParser, get_peft_config
from trl.trainer.reward_trainer import DataCollatorForPreference

from conversations import MIN_MAX_LENGTH, encode_batch
from evaluate_reward_model import (
    Columns,
    model_card,
    pair_metrics,
    processed_pairs,
    rounded,
    score_together,
    summary,
    write_evaluation,
)
from load_helpsteer_dataset import OUTPUT_DIR as DATA_DIR
from load_helpsteer_dataset import (
    default_max_length,
    draw,
    load_processed,
    pair_keys,
    split_by_prompt,
    stream_processed,
)
from load_smollm_model import (
    MODEL_NAME,
    InputError,
    ModelSource,
    autocast_dtype,
    check_files,
    decided_by_first,
    first_line,
    keep_freed_memory,
    load_reward_model,
    load_tokenizer,
    pick_device,
    replace_directory,
    resolve_model,
    round_weights,
    run_script,
    share_prefixes,
    sole_writer,
    write_checksums,
    write_text,
)
from reward_model_demo import MODEL_PATH, RewardModelEvaluator, wins

DEVICE = pick_device()
ON_MPS = DEVICE.type == "mps"

# ---------------------------------------------------------------------------------------------------------------------
# data
MAX_TRAIN_SAMPLES = None  # pairs, drawn at random; None takes all
MAX_EVAL_SAMPLES = 400  # pairs for the evaluations during training; the last one takes the whole validation split
# optimisation
LEARNING_RATE = 5e-5  # peak
NUM_TRAIN_EPOCHS = 1  # passes over the training pairs
PER_DEVICE_TRAIN_BATCH_SIZE = 1 if ON_MPS else 4  # pairs per step and device
GRADIENT_ACCUMULATION_STEPS = 8 if ON_MPS else 2  # steps per update: 8 pairs, of all processes together
WARMUP_STEPS = 0.05  # share of all updates (a whole number counts updates)
LR_SCHEDULER_TYPE = "linear"  # decay to 0 after the warm-up
WEIGHT_DECAY = 0.0  # AdamW
MAX_GRAD_NORM = 1.0  # gradient clipping
DROPOUT = 0.0  # wherever the architecture has one: in SmolLM2 that is attention
# loss
CENTER_REWARDS_COEFFICIENT = 0.01  # weight of (r_chosen + r_rejected)^2, arXiv 2312.09244
# rhythm, in updates; scaled down when a run has fewer of them
LOGGING_STEPS = 50
EVAL_STEPS = 100
SAVE_STEPS = 200
SAVE_TOTAL_LIMIT = 2  # checkpoints kept, the best one among them
SEED = 42
# ---------------------------------------------------------------------------------------------------------------------

# TRL's defaults are for language models and name no layers.
LORA_DEFAULTS = {"lora_task_type": "SEQ_CLS", "lora_target_modules": ["all-linear"]}
LORA_FLAGS = {each.name for each in fields(ModelConfig) if each.name.startswith("lora_")} | {"use_rslora", "use_dora"}

# Flags of TRL that would be without effect here, or undo what the data was prepared with.
UNSUPPORTED = {
    **dict.fromkeys(
        (each.name for each in fields(ModelConfig) if each.name not in {"use_peft", *LORA_FLAGS}),
        "the base model is named by --model and loaded in fp32",
    ),
    **dict.fromkeys(
        ("model_init_kwargs", "trust_remote_code"), "the base model is loaded in fp32 without its own code"
    ),
    **dict.fromkeys(("chat_template_path", "pad_token", "eos_token"), "the data was prepared with the model's own"),
    "label_smoothing_factor": "the loss of a pair has no labels",
    "save_only_model": "a stopped run could not go on to the same weights",
    "max_length": "load_helpsteer_dataset.py cuts to --max_length (here only with --streaming)",
    "lora_task_type": "a reward model is a sequence classifier",
}

CHECKPOINT_REMEDY = "delete this checkpoint, the one before it is used then, or start over by --fresh"
LOCK = ".lock"  # in the output directory while a run writes there
MIN_WARMUP_UPDATES = 20  # shorter runs start at the full learning rate

METRICS = ("pair_accuracy", "accuracy", "margin", "loss")  # of an evaluation
# What the state of an optimiser brings along: a run that continues a checkpoint can not change it.
KEPT_BY_OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim")

# Settings that do not change the result: a checkpoint may be continued under others.
IGNORED_ON_RESUME = {
    *("fresh", "data", "output_dir", "resume_from_checkpoint", "disable_tqdm", "report_to", "run_name", "project"),
    *("log_level", "log_level_replica", "log_on_each_node", "logging_dir", "logging_first_step", "logging_steps"),
    *("logging_strategy", "include_num_input_tokens_seen", "save_total_limit", "push_to_hub", "hub_model_id"),
    *("hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision", "local_rank"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataset_num_proc"),
}


@dataclass
class ScriptArguments:
    """What this script adds to the fields of `RewardConfig`."""

    model: str = field(default=MODEL_NAME, metadata={"help": "base model: hub id or local directory"})
    data: str = field(default=DATA_DIR, metadata={"help": "directory written by load_helpsteer_dataset.py"})
    streaming: str | None = field(
        default=None, metadata={"help": "train straight from this source (file, directory, hub id) for --max_steps"}
    )
    split: str | None = field(default=None, metadata={"help": "of a hub dataset, with --streaming"})
    train_half: int | None = field(
        default=None,
        metadata={"help": "1 or 2: that half of the training prompts, for two independent judges", "choices": [1, 2]},
    )
    max_train_samples: int | None = field(default=MAX_TRAIN_SAMPLES, metadata={"help": "pairs, drawn at random"})
    max_eval_samples: int = field(default=MAX_EVAL_SAMPLES, metadata={"help": "pairs per evaluation in training"})
    dropout: float = field(default=DROPOUT, metadata={"help": "wherever the model has it; SmolLM2: in attention"})
    fresh: bool = field(default=False, metadata={"help": "start over instead of resuming"})


def default_config() -> dict[str, Any]:
    """The constants above under their names in `RewardConfig`."""
    dtype = autocast_dtype(DEVICE)
    return {
        "output_dir": MODEL_PATH,
        "learning_rate": LEARNING_RATE,
        "num_train_epochs": NUM_TRAIN_EPOCHS,
        "per_device_train_batch_size": PER_DEVICE_TRAIN_BATCH_SIZE,
        "per_device_eval_batch_size": 2 * PER_DEVICE_TRAIN_BATCH_SIZE,
        "gradient_accumulation_steps": GRADIENT_ACCUMULATION_STEPS,
        "warmup_steps": WARMUP_STEPS,
        "lr_scheduler_type": LR_SCHEDULER_TYPE,
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
        "seed": SEED,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "gradient_checkpointing": None,  # off, unlike TRL's default: 135 M parameters do not need it
        "disable_dropout": False,  # decided by --dropout alone
        "pad_to_multiple_of": 64 if ON_MPS else None,  # fewer shapes: the MPS allocator keeps a cache for each
        "max_length": None,  # lengths are settled in the data; TRL would drop long pairs
        "report_to": "none",
        "use_cpu": DEVICE.type == "cpu",
    }


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


def named(places: Sequence[str]) -> str:
    """Where pairs or prompts come from, for the end of a message; empty without any."""
    return f" at {', '.join(places)}" if places else ""


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
        decided_by_first(lambda: check_files(self.state.best_model_checkpoint, "--fresh starts over"))
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


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C into a request to stop after the update; a second one stops at once.

    Yields:
        A function that tells whether any process was asked to stop. All processes have to call it after the same
        update, so that all of them stop there.
    """
    requests = []

    def note(number, frame):
        if requests:
            raise KeyboardInterrupt
        requests.append(number)
        print("\nStopping after this update; Ctrl-C again to stop at once.", file=sys.stderr)

    def requested() -> bool:
        return any(gather_object([bool(requests)]))

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield requested
    finally:
        signal.signal(signal.SIGINT, previous)


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


# --- settings --------------------------------------------------------------------------------------------------------


def parse_settings(arguments: list[str] | None = None) -> tuple[ScriptArguments, RewardConfig, ModelConfig]:
    """Flags over constants; an unknown flag or a bad value ends with a usage line."""
    parser = TrlParser((ScriptArguments, RewardConfig, ModelConfig), description=__doc__.splitlines()[0])
    parser.set_defaults(**default_config(), **LORA_DEFAULTS)
    names = [each.name for each in (*fields(RewardConfig), *fields(ModelConfig))]
    defaults = {name: parser.get_default(name) for name in names}  # a --config file will change those of the parser
    try:
        script, config, lora = parser.parse_args_and_config(arguments)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {' '.join(str(error).split())}\n")
    for settings, name in [
        (script, "max_train_samples"),
        (script, "max_eval_samples"),
        (config, "num_train_epochs"),
        (config, "per_device_train_batch_size"),
        (config, "per_device_eval_batch_size"),
        (config, "gradient_accumulation_steps"),
    ]:
        value = getattr(settings, name)
        if value is not None and value <= 0:
            parser.error(f"--{name} must be above 0")
    given, untouched = vars(config) | vars(lora), vars(ModelConfig(**LORA_DEFAULTS))
    for name, value in given.items():
        changed = value != untouched.get(name, defaults.get(name))
        if changed and name in UNSUPPORTED and not (name == "max_length" and script.streaming):
            parser.error(f"--{name} is not supported: {UNSUPPORTED[name]}")
        if changed and name in LORA_FLAGS and not lora.use_peft:
            parser.error(f"--{name} needs --use_peft")
    if (config.metric_for_best_model or "loss").removeprefix("eval_") not in METRICS:
        parser.error(f"--metric_for_best_model must be one of {', '.join(METRICS)}")
    if config.seed < 0:
        parser.error("--seed must not be negative")
    if config.torch_compile and DEVICE.type == "cpu":
        parser.error("--torch_compile is not supported on a CPU, where prompts are shared instead")
    if config.max_length is not None and config.max_length < MIN_MAX_LENGTH:
        parser.error(f"--max_length must be at least {MIN_MAX_LENGTH}")
    if script.streaming and config.max_steps <= 0:
        parser.error("--streaming needs --max_steps: a stream has no known end")
    if script.streaming and (script.train_half or script.max_train_samples):
        parser.error("--train_half and --max_train_samples need prepared data; they exclude --streaming")
    if script.split and not script.streaming:
        parser.error("--split needs --streaming")
    if script.fresh and config.resume_from_checkpoint:
        parser.error("--fresh and --resume_from_checkpoint exclude each other")
    if config.save_total_limit == 1:
        config.save_total_limit = 2  # the best checkpoint and the last one, from which a stopped run goes on
    return script, config, lora


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


def run_settings(
    script: ScriptArguments, config: RewardConfig, lora: ModelConfig, metadata: dict[str, Any], origin: str
) -> dict[str, Any]:
    """All resolved settings, with what identifies base model and data."""
    run = {"base_model": origin, "data_identity": data_identity(metadata), "world_size": config.world_size}
    adapter = {name: value for name, value in vars(lora).items() if name in {"use_peft", *LORA_FLAGS}}
    return {**config.to_dict(), **vars(script), **adapter, **run}


def changes(before: dict[str, Any], settings: dict[str, Any], ignored: set[str]) -> str:
    """Settings in which a run differs from an earlier one, as `name before -> now`; empty for the same ones."""
    now = json.loads(settings_text(settings))
    names = sorted((before.keys() | now.keys()) - ignored)
    return ", ".join(
        f"{name} {before.get(name)} -> {now.get(name)}" for name in names if before.get(name) != now.get(name)
    )


def prepare_checkpoints(checkpoints: Path, settings: dict[str, Any], ignored: set[str], fresh: bool) -> None:
    """Keep the checkpoints of a run with these settings; otherwise begin with an empty directory.

    Args:
        ignored: names of settings that may differ.

    Raises:
        InputError: the checkpoints there belong to an unfinished run with other settings.
    """
    before = None if fresh else read_settings(checkpoints)
    if before and last_checkpoint(checkpoints):
        changed = changes(before, settings, ignored)
        if not changed:
            return
        if not (checkpoints / "finished").exists():
            raise InputError(
                f"{checkpoints}: holds an unfinished run with other settings ({changed}); "
                "--fresh starts over, another --output_dir keeps both"
            )
    with replace_directory(checkpoints, marker="settings.json") as directory:
        write_text(directory / "settings.json", settings_text(settings))


def settings_text(settings: dict[str, Any]) -> str:
    return json.dumps(settings, indent=2, default=str) + "\n"


def checkpoint_to_resume(checkpoints: Path, settings: dict[str, Any], ignored: set[str], fresh: bool) -> str | None:
    """The last checkpoint of a run with these settings, after `prepare_checkpoints`; the same in all processes."""

    def choose() -> str | None:
        prepare_checkpoints(checkpoints, settings, ignored, fresh)
        return last_checkpoint(checkpoints)

    return decided_by_first(choose)


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
    return True


def adopt_checkpoint(checkpoint: Path, settings: dict[str, Any], checkpoints: Path) -> None:
    """Let a run with these settings, which saves into `checkpoints`, continue a checkpoint that the user named.

    Raises:
        InputError: not a complete checkpoint, of another model or other data, with another optimiser; or what is in
            `checkpoints` belongs to another run, with which this one would be mixed up.
    """
    if not is_complete(checkpoint):
        raise InputError(f"{checkpoint}: not a complete checkpoint; name a checkpoint-N directory")
    check_files(checkpoint, CHECKPOINT_REMEDY)
    before = read_settings(checkpoint.parent) or json.loads(settings_text(settings))
    for name in ("base_model", "data_identity", *KEPT_BY_OPTIMIZER):
        if before.get(name) != settings[name]:
            raise InputError(f"{checkpoint}: its {name} is {before.get(name)}, that of this run {settings[name]}")
    if checkpoint.parent.resolve() != checkpoints.resolve():
        prepare_checkpoints(checkpoints, settings, IGNORED_ON_RESUME, fresh=False)
        return
    if changed := changes(before, settings, IGNORED_ON_RESUME):
        last = last_checkpoint(checkpoints) or checkpoints
        if Path(last).resolve() != checkpoint.resolve():
            raise InputError(
                f"{checkpoint}: {last} goes on from it with other settings ({changed}); give another --output_dir"
            )
        write_text(checkpoints / "settings.json", settings_text(settings))
    (checkpoints / "finished").unlink(missing_ok=True)


def read_settings(checkpoints: Path) -> dict[str, Any] | None:
    """Settings of the run that wrote these checkpoints, if any.

    Raises:
        InputError: they can not be read.
    """
    path = checkpoints / "settings.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged ({first_line(error)}); --fresh starts over") from error


def claim_output(output: Path, needed: Sequence[str], rewards: bool) -> None:
    """Refuse a directory that holds something else than a model of this kind or its checkpoints, or a needed model.

    Args:
        needed: models that the run reads.
        rewards: whether the run makes a reward model.

    Raises:
        InputError: it does.
    """
    for model in needed:
        if output.exists() and Path(model).exists() and output.samefile(model):
            raise InputError(f"{output}: this run reads the model there; choose another --output_dir")
    ours = output.is_dir() and ((output / "checkpoints").is_dir() or {each.name for each in output.iterdir()} <= {LOCK})
    if output.exists() and not ours:
        raise InputError(f"{output}: holds other files, which a model would overwrite; choose another --output_dir")
    try:
        found = json.loads((output / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    except (OSError, ValueError, LookupError, TypeError):
        return  # no model, or a damaged one
    if str(found).endswith("ForSequenceClassification") != rewards:
        raise InputError(f"{output}: holds a {found}, which would be overwritten; choose another --output_dir")


@contextlib.contextmanager
def held_output(output: Path) -> Iterator[None]:
    """Keep other runs out of a directory of results until the block ends; the first process does it for all.

    Raises:
        InputError: in all processes, when another run is writing there or the directory can not be written.
    """
    with contextlib.ExitStack() as held:
        decided_by_first(lambda: held.enter_context(sole_writer(output, output / LOCK)))
        yield


# --- results ---------------------------------------------------------------------------------------------------------


def plot_curves(history: list[dict[str, float]], path: Path) -> None:
    """Loss, validation accuracy, learning rate and gradient norm against updates."""
    panels = {
        "loss": {"loss": "train", "eval_loss": "validation"},
        "accuracy": {"accuracy": "train", "eval_pair_accuracy": "validation"},
        "learning rate": {"learning_rate": "learning rate"},
        "gradient norm": {"grad_norm": "before clipping"},
    }
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axis, (title, series) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for key, label in series.items():
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            axis.plot(*zip(*points, strict=True) if points else ((), ()), marker=".", label=label)
        axis.set(title=title, xlabel="updates")
        axis.legend()
    figure.savefig(path, dpi=120)


def publish(staging: Path, output: Path) -> None:
    """Move finished files into place; `config.json` goes first and comes last, since nothing reads a model without."""
    for stale in ("config.json", "demonstration.json"):
        (output / stale).unlink(missing_ok=True)
    for item in sorted(staging.iterdir(), key=lambda item: item.name == "config.json"):
        if item.is_dir():
            shutil.rmtree(output / item.name, ignore_errors=True)
        item.replace(output / item.name)


# --- the stages, in order --------------------------------------------------------------------------------------------


def half_of(pairs: Dataset, half: int | None, seed: int) -> Dataset:
    """The pairs of one half of the prompts, or all pairs; `seed` is that of the data, the same for both halves."""
    if half is None:
        return pairs
    texts = pairs.select_columns(["prompt", "chosen", "rejected"])
    prompt_keys = np.array([pair_keys(pair)["prompt_key"] for pair in texts])
    return pairs.select(split_by_prompt(prompt_keys, 0.5, seed)[half - 1])


def data_name(script: ScriptArguments) -> str:
    """The prepared data or the stream, as the user named it."""
    return script.streaming or script.data


def open_stream(script: ScriptArguments, config: RewardConfig, model: ModelSource) -> tuple[dict, dict[str, Any]]:
    """Splits and metadata straight from the source that `--streaming` names."""
    max_length, config.max_length = config.max_length or default_max_length(), None  # TRL would drop long pairs
    return stream_processed(script.streaming, script.split, model, max_length, script.max_eval_samples, config.seed)


def pick_train_pairs(script: ScriptArguments, seed: int, pairs: Dataset, data_seed: int) -> Dataset:
    """The half of the pairs that was asked for, and of it so many, drawn at random."""
    pairs = half_of(pairs, script.train_half, data_seed)
    return pairs.select(draw(len(pairs), script.max_train_samples, seed))


def with_rows(pairs: Dataset) -> Dataset:
    """The pairs with their numbers, which `PairTrainer` names."""
    return pairs.add_column("row", np.arange(len(pairs)))


def computing_type(config: RewardConfig) -> torch.dtype:
    """What the linear layers are computed in."""
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32


def build_trainer(
    script: ScriptArguments,
    config: RewardConfig,
    lora: ModelConfig,
    splits: dict[str, Any],
    metadata: dict[str, Any],
    source: ModelSource,
) -> PairTrainer:
    """Trainer over the drawn pairs, or over the stream, with a fresh reward model."""
    if DEVICE.type == "cpu":
        keep_freed_memory()
    train_pairs, eval_pairs = splits["train"], with_rows(splits["validation"])
    if not script.streaming:
        train_pairs = pick_train_pairs(script, config.seed, with_rows(train_pairs), metadata["seed"])
    eval_pairs = eval_pairs.select(draw(len(eval_pairs), script.max_eval_samples, config.seed))
    share_update(config)
    fit_rhythm(config, 0 if script.streaming else len(train_pairs))
    tokenizer = load_tokenizer(source.path)
    check_tokens(eval_pairs, tokenizer, metadata["max_length"], metadata["tokenizer"])
    model = load_reward_model(source.path, tokenizer.pad_token_id, config.seed, script.dropout)
    longest = getattr(model.config, "max_position_embeddings", math.inf)
    if metadata["max_length"] > longest:
        raise InputError(
            f"{data_name(script)}: has up to {metadata['max_length']} tokens, but {script.model} takes {longest}"
        )
    model.config.reward_max_length = metadata["max_length"]
    if DEVICE.type == "cpu":
        share_prefixes(model)
    try:
        with refused_settings(ValueError):
            trainer = PairTrainer(
                model=model,
                args=config,
                data_collator=PlaceCollator(tokenizer.pad_token_id, config.pad_to_multiple_of),
                train_dataset=train_pairs,
                eval_dataset=eval_pairs,
                processing_class=tokenizer,
                compute_metrics=pair_accuracy,
                peft_config=get_peft_config(lora),
            )
    except (ImportError, RuntimeError) as error:
        if not config.report_to:
            raise
        raise InputError(f"--report_to {' '.join(config.report_to)}: {first_line(error)}") from error
    if trainer.accelerator.is_fsdp2 and computing_type(config) != torch.float32:
        # That of `accelerate` would round rewards, and sums of gradients, to what the layers are computed in.
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=computing_type(config), reduce_dtype=torch.float32
        )
    return trainer


def train(trainer: PairTrainer, settings: dict[str, Any], fresh: bool) -> Watch:
    """Run or resume the training; ends the process with exit code 130 when it was interrupted."""
    first, checkpoint = trainer.is_world_process_zero(), trainer.args.resume_from_checkpoint
    if checkpoint:
        decided_by_first(lambda: adopt_checkpoint(Path(checkpoint), settings, Path(trainer.args.output_dir)))
    else:
        checkpoint = checkpoint_to_resume(Path(trainer.args.output_dir), settings, IGNORED_ON_RESUME, fresh)
        if checkpoint:
            decided_by_first(lambda: check_files(checkpoint, CHECKPOINT_REMEDY))
    if checkpoint and first:
        print(f"Resuming from {checkpoint} (--fresh starts over).")
    with stop_requests() as stop_requested:
        watch = Watch(stop_requested)
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


def write_results(
    staging: Path, columns: Columns, metrics: dict[str, Any], settings: dict, metadata: dict, log: list[dict]
) -> None:
    """Complete a saved model with its figures, settings, log, plots and card."""
    (staging / "training_args.bin").unlink(missing_ok=True)  # a pickle, and all in settings.json anyway
    plots = write_evaluation(columns, metrics, staging)
    plot_curves(log, staging / "plots" / "training_curves.png")
    config = json.loads((staging / "config.json").read_text(encoding="utf-8"))
    config |= {name: metrics[name] for name in ("reward_mean", "reward_std")}
    contents = {"config": config, "metrics": rounded(metrics), "settings": settings, "training_log": log}
    for name, content in contents.items():
        write_text(staging / f"{name}.json", json.dumps(content, indent=2, default=str) + "\n")
    write_text(staging / "README.md", model_card(metrics, settings, metadata, ["training_curves.png", *plots]))
    write_checksums(staging)


def finish(
    trainer: PairTrainer,
    watch: Watch,
    pairs: Dataset,
    name: str,
    source: ModelSource,
    settings: dict,
    metadata: dict,
    output: Path,
) -> dict[str, Any] | None:
    """Save, evaluate what was saved on the whole validation split, publish; the first process returns the metrics.

    Every process takes its part in saving and in evaluating; the first one writes.
    """
    staging, first, wait = output / ".new", trainer.is_world_process_zero(), trainer.accelerator.wait_for_everyone
    if first:
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
    wait()
    if not settings["use_peft"]:
        round_weights(trainer.model, computing_type(trainer.args))
    try:
        trainer.save_model(str(staging))
        if first and settings["use_peft"]:
            save_merged(trainer, source, staging)
        wait()
        evaluator = RewardModelEvaluator(str(staging), device=str(trainer.accelerator.device), mixed_precision=True)
        columns = score_together(evaluator, pairs, name)
        if not first:
            return None
        metrics = {**pair_metrics(columns), "source": metadata["source"], **run_figures(trainer, watch)}
        write_results(staging, columns, metrics, settings, metadata, trainer.state.log_history)
        publish(staging, output)
    finally:
        if first:
            shutil.rmtree(staging, ignore_errors=True)
    return metrics


def report(metrics: dict[str, Any], output: Path) -> str:
    """The result in one line."""
    speed = f"{metrics['train_seconds']:.0f} s in updates, {metrics['train_pairs_per_second'] or math.nan:.2f} pairs/s"
    return f"{summary(metrics)}; {speed}; written to {output}/"


def main() -> None:
    script, config, lora = parse_settings()
    output = Path(config.output_dir)
    config.output_dir = str(output / "checkpoints")
    claim_output(output, [script.model], rewards=True)
    prepared = None if script.streaming else load_processed(script.data)
    with held_output(output):
        source = resolve_model(script.model)
        splits, metadata = prepared or open_stream(script, config, source)
        trainer = build_trainer(script, config, lora, splits, metadata, source)
        settings = run_settings(script, config, lora, metadata, source.origin)
        watch = train(trainer, settings, script.fresh)
        pairs = processed_pairs(splits, data_name(script), "validation")
        metrics = finish(trainer, watch, pairs, data_name(script), source, settings, metadata, output)
        if metrics:
            (output / "checkpoints" / "finished").touch()
            print(report(metrics, output))


if __name__ == "__main__":
    run_script(main)
