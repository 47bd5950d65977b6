"""Train the reward model: one label, Bradley-Terry loss, TRL's `RewardTrainer`.

In:  `processed_helpsteer/` from `load_helpsteer_dataset.py`, and a base model.
Out: `reward_model_output/`: model and tokenizer, `metrics.json`, `rewards.csv`, `mistakes.md`, `settings.json`,
     `training_log.json`, `plots/`, `README.md` (model card), `checkpoints/`.

    python train_reward_model.py
    python train_reward_model.py --learning_rate 2e-5 --num_train_epochs 2 --output_dir other_output
    python train_reward_model.py --use_peft --learning_rate 5e-4
    python train_reward_model.py --streaming hub/dataset --max_steps 10000
    accelerate launch train_reward_model.py

Every field of `trl.RewardConfig` is a flag, and so are TRL's for LoRA. A stopped run goes on by the same command;
`--fresh` starts over.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from reward_pipeline.conversations import MIN_MAX_LENGTH
from reward_pipeline.processes import run_script
from reward_pipeline.settings import (
    Parser,
    apple_silicon,
    boolean,
    column,
    edited_constants,
    filled_text,
    or_none,
    real,
    whole,
)
from reward_pipeline.trl_flags import (
    LORA_DEFAULTS,
    METRICS,
    MODEL_CONFIG,
    REWARD_CONFIG,
    add_trl_flags,
    fields_given,
    lora_fields,
    missing_tracker,
    refuse_unsupported,
)

ON_MPS = apple_silicon()  # where a batch of long pairs would not fit

# ---------------------------------------------------------------------------------------------------------------------
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # base model: hub id or local directory
DATA = "processed_helpsteer"  # directory written by load_helpsteer_dataset.py
OUTPUT_DIR = "./reward_model_output"  # directory, made whole at the end
# data
MAX_TRAIN_SAMPLES = None  # pairs, drawn at random; None takes all
MAX_EVAL_SAMPLES = 400  # pairs for the evaluations during training; the last one takes the whole validation split
STREAM_MAX_LENGTH = 128 if ON_MPS else 256  # tokens, with --streaming; prepared data brings its own
STREAM_VALIDATION_SHARE = 0.2  # of the prompts, with --streaming
MISMATCHED_SHARE = 0.15  # of the training pairs, so many more with the answer to another prompt: it has to read both
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
FORM_TERM = True  # the form model's margin is added to the reward's, which so learns what form leaves over
CENTER_REWARDS_COEFFICIENT = 0.01  # weight of (r_chosen + r_rejected)^2, arXiv 2312.09244
KEEP_ADAPTER = False  # True: with --use_peft the adapter is kept too, in adapter/
# rhythm, in updates; scaled down when a run has fewer of them
LOGGING_STEPS = 50
EVAL_STEPS = 100
SAVE_STEPS = 200
SAVE_TOTAL_LIMIT = 2  # checkpoints kept, the best one among them
SEED = 42
# ---------------------------------------------------------------------------------------------------------------------

DATA_SCRIPT = "load_helpsteer_dataset.py"  # whose constants may have been edited since it ran

# What TRL gets where nothing else is said: the constants above under its names, and what this project decides.
TRL_DEFAULTS = {
    "output_dir": OUTPUT_DIR,
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
    "metric_for_best_model": "accuracy",
    "seed": SEED,
    "report_to": "none",
    # Off, unlike in TRL: 135 M parameters do not need it, and it costs a fifth of the time. None and not False, since
    # `transformers` warns of any value of this older name of `activation_checkpointing`.
    "gradient_checkpointing": None,
    "pad_to_multiple_of": 64 if ON_MPS else None,  # fewer shapes: the MPS allocator keeps a cache for each
}

# Flags of TRL that would be without effect here, or undo what the data was prepared with.
UNSUPPORTED = {
    **dict.fromkeys(
        (
            *("model_name_or_path", "model_revision", "dtype", "attn_implementation", "model_init_kwargs"),
            *("load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"),
        ),
        "the base model is named by --model and loaded in fp32",
    ),
    **dict.fromkeys(("chat_template_path", "pad_token", "eos_token"), "the data was prepared with the model's own"),
    "trust_remote_code": "code of a model is never run",
    "disable_dropout": "--dropout decides",
    "label_smoothing_factor": "the loss of a pair has no labels",
    "label_names": "the loss of a pair has no labels",
    "lora_task_type": "a reward model is a sequence classifier",
    "remove_unused_columns": "the places of pairs are needed to name them",
    "batch_eval_metrics": "every pair is counted once, over all batches",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "a run trains, then evaluates"),
    "parallelism_config": "accelerate launch sets it up",
    "save_only_model": "a stopped run could not go on to the same weights",
    **dict.fromkeys(("hub_strategy", "hub_always_push"), "--push_to_hub uploads the finished directory, once"),
}

# Settings that do not change the result: a checkpoint may be continued under others.
IGNORED_ON_RESUME = {
    *("model", "base_model", "data", "output_dir"),  # the weights and the pairs are compared, wherever they lie
    *("config", "fresh", "resume_from_checkpoint", "disable_tqdm", "report_to", "run_name"),
    *("project", "log_level", "log_level_replica", "log_on_each_node", "logging_dir", "logging_first_step"),
    *("logging_steps", "logging_strategy", "include_num_input_tokens_seen", "save_total_limit", "push_to_hub"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision", "local_rank"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataset_num_proc"),
}
# What the state of an optimiser brings along: a run that continues a checkpoint can not change it.
KEPT_BY_OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim")


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Flags over constants; those of TRL that have no constant are there only where they are given."""
    parser = Parser(__doc__)
    parser.flag("model", MODEL, filled_text, "base model: hub id or local directory")
    parser.flag("data", None, filled_text, f"directory written by load_helpsteer_dataset.py (default: {DATA})")
    parser.flag("streaming", None, filled_text, "train straight from this file, directory or hub id, for --max_steps")
    parser.flag("split", None, filled_text, "of a hub dataset, with --streaming")
    parser.flag("columns", None, column, "with --streaming, names in a layout that is not known", nargs="+")
    parser.flag("train_half", None, whole(1, 2), "1 or 2: that half of the training prompts, for two separate judges")
    parser.flag("max_train_samples", MAX_TRAIN_SAMPLES, or_none(whole(1)), "pairs, drawn at random (default: all)")
    parser.flag("max_eval_samples", MAX_EVAL_SAMPLES, whole(1), "pairs per evaluation during the training")
    parser.flag("mismatched_share", MISMATCHED_SHARE, real(least=0, most=1), "of the pairs, more with another's answer")
    parser.flag("form_term", None, boolean, f"let the reward learn what form leaves over (default: {FORM_TERM})")
    parser.flag("keep_adapter", KEEP_ADAPTER, boolean, "with --use_peft: keep it beside the merged model, in adapter/")
    parser.flag("dropout", DROPOUT, real(least=0, below=1), "wherever the model has it; SmolLM2: in attention")
    parser.flag("fresh", False, boolean, "start over instead of resuming")
    parser.constant("stream_max_length", STREAM_MAX_LENGTH, whole(MIN_MAX_LENGTH))
    parser.constant("stream_validation_share", STREAM_VALIDATION_SHARE, real(above=0, below=1))
    add_trl_flags(parser, TRL_DEFAULTS, UNSUPPORTED)
    options = parser.parse_args(arguments)

    given = vars(options)
    refuse_unsupported(parser, given, UNSUPPORTED)
    if (options.metric_for_best_model or "loss").removeprefix("eval_") not in METRICS:
        parser.error(f"--metric_for_best_model: must be one of {', '.join(METRICS)}")
    if options.streaming is None:
        for name in ("split", "columns", "max_length"):
            if given.get(name) is not None:
                parser.error(f"--{name}: needs --streaming; load_helpsteer_dataset.py decides it for prepared data")
        options.data = options.data or DATA
        options.form_term = FORM_TERM if options.form_term is None else options.form_term
    else:
        if given.get("max_steps", -1) < 0:
            parser.error("--streaming: needs --max_steps, since a stream has no known end")
        for name in ("data", "train_half", "max_train_samples", "form_term"):
            if given[name]:
                parser.error(f"--{name}: needs prepared data, so it does not go with --streaming")
        options.form_term = False
    if missing := missing_tracker(options.report_to if isinstance(options.report_to, list) else [options.report_to]):
        parser.error(f"--report_to: {missing} is not installed; pip install {missing}")
    if options.load_best_model_at_end and "no" in (options.eval_strategy, options.save_strategy):
        name = "eval_strategy" if options.eval_strategy == "no" else "save_strategy"
        parser.error(f"--{name}: no needs --load_best_model_at_end false")
    if options.fresh and given.get("resume_from_checkpoint"):
        parser.error("--fresh: does not go with --resume_from_checkpoint")
    if given.get("bf16") and given.get("fp16"):
        parser.error("--fp16: does not go with --bf16")
    if options.save_total_limit == 1:
        options.save_total_limit = 2  # the best checkpoint and the last one, from which a stopped run goes on
    return options


def main() -> None:
    options = parse_options()

    # Only now, since torch and its kin take seconds to load: a wrong flag has been answered by then.
    import torch
    from datasets import concatenate_datasets
    from trl import ModelConfig, RewardConfig, get_peft_config

    from reward_pipeline import (
        devices,
        hub,
        models,
        pair_metrics,
        pairs,
        prefix_sharing,
        processed,
        reward_training,
        runs,
    )
    from reward_pipeline.evaluator import RewardModelEvaluator
    from reward_pipeline.files import InputError
    from reward_pipeline.processes import is_first_process, stop_requests, together

    # --- settings: bf16 or fp16 where the hardware computes in it; weights stay in fp32
    device = torch.device("cpu") if vars(options).get("use_cpu") else devices.pick_device()
    if device.type == "cpu":
        devices.keep_freed_memory()  # before the first large block is allocated
    chosen = vars(options).get("bf16") or vars(options).get("fp16")
    dtype = None if chosen else devices.autocast_dtype(device)
    given = {"bf16": dtype is torch.bfloat16, "fp16": dtype is torch.float16} | vars(options)
    decided = {
        "use_cpu": device.type == "cpu",
        "max_length": None,  # lengths are settled in the data; TRL would drop long pairs
        "disable_dropout": False,  # --dropout alone decides
        "remove_unused_columns": False,  # the collator takes what it needs, and the places of the pairs
    }
    with reward_training.refused_settings(ValueError, ImportError, OSError):  # OSError: of files that flags name
        config = RewardConfig(**fields_given(REWARD_CONFIG, given) | decided)
        lora = ModelConfig(**LORA_DEFAULTS | fields_given(MODEL_CONFIG, given))
    if config.torch_compile and device.type == "cpu":  # `--torch_compile_mode` and `--torch_compile_backend` turn it on
        raise InputError("--torch_compile: not supported on a CPU, where prompts are shared instead")
    output, checkpoints = Path(config.output_dir), Path(config.output_dir) / "checkpoints"
    config.output_dir = str(checkpoints)
    pushed, config.push_to_hub = config.push_to_hub, False  # the trainer would upload checkpoints, and no figures
    # The pairs of an update are those of all processes together, so that their number does not change the result.
    reward_training.share_update(config, PER_DEVICE_TRAIN_BATCH_SIZE, GRADIENT_ACCUMULATION_STEPS)

    def push() -> None:
        """Upload the finished directory, where that is asked for."""
        if pushed:
            name = config.hub_model_id or output.resolve().name
            wanted = config.hub_token, config.hub_private_repo, config.hub_revision
            address = together(lambda: hub.push_directory(output, name, *wanted), first_alone=True)
            if is_first_process():
                print(f"uploaded to {address}")

    # --- data and base model: everything needed is found before anything is made
    if pushed:
        together(lambda: hub.check_login(config.hub_token), first_alone=True)
    runs.claim_output(output, [options.model], rewards=True)
    prepared = None if options.streaming else processed.load_processed(options.data)
    base = models.resolve_model(options.model)
    tokenizer = models.load_tokenizer(base.path)
    if prepared:
        splits, metadata = prepared
        # Data of another tokenizer would train without a word, on ids that mean something else.
        processed.check_tokens(splits["validation"], tokenizer, metadata["max_length"], metadata["tokenizer"])
        # The halves are those of the data's seed, whatever the seed of the training: two judges share no prompt.
        train_pairs = pairs.half_of(reward_training.numbered(splits["train"]), options.train_half, metadata["seed"])
        train_pairs = train_pairs.select(pairs.draw(len(train_pairs), options.max_train_samples, config.seed))
        # Of these pairs alone: two judges would otherwise have learned from each other's.
        whole = len(train_pairs) == len(splits["train"])
        form_model = metadata["form_model"] if whole else processed.fitted_form_model(train_pairs)
        mismatched = processed.mismatched_ids(
            train_pairs, options.mismatched_share, tokenizer, metadata["max_length"], config.seed
        )
        train_pairs = concatenate_datasets([train_pairs, mismatched])
        updates = reward_training.fit_rhythm(config, len(train_pairs), WARMUP_STEPS)
    else:
        splits, metadata = processed.stream_processed(
            options.streaming,
            options.split,
            base,
            max_length=given.get("max_length") or STREAM_MAX_LENGTH,
            validation_pairs=options.max_eval_samples,
            validation_share=STREAM_VALIDATION_SHARE,
            mismatched_share=options.mismatched_share,
            seed=config.seed,
            columns=options.columns or (),
        )
        train_pairs, form_model = splits["train"], None  # of a stream nobody has seen enough for one
        updates = reward_training.fit_rhythm(config, 0, WARMUP_STEPS)  # --max_steps says how long it is
    eval_pairs = reward_training.numbered(splits["validation"])
    eval_pairs = eval_pairs.select(pairs.draw(len(eval_pairs), options.max_eval_samples, config.seed))

    # --- reward model: the SFT model with a fresh head of one label
    model = models.load_reward_model(base.path, tokenizer.pad_token_id, config.seed, options.dropout)
    data_name = options.streaming or options.data
    longest = models.positions(model)
    if metadata["max_length"] > longest:
        raise InputError(f"{data_name}: has up to {metadata['max_length']} tokens, but {options.model} takes {longest}")
    model.config.reward_max_length, model.config.reward_format = metadata["max_length"], models.REWARD_FORMAT
    # The baselines of every later evaluation, and whether form is a part of the reward; a stream has none.
    model.config.form_model, model.config.author_strengths = form_model, metadata.get("author_strengths")
    model.config.form_term = options.form_term
    if device.type == "cpu":
        prefix_sharing.share_prefixes(model)  # chosen and rejected have their prompt in common

    # What the run is. `to_dict` comes last: it holds the rhythm as it was fitted, and no token of the hub.
    adapter = {name: getattr(lora, name) for name in ("use_peft", *sorted(lora_fields()))}
    settings = vars(options) | adapter | config.to_dict()
    settings |= {"base_model": base.origin, "world_size": config.world_size}
    settings |= {"base_weights": together(lambda: models.weights_digest(base.path), first_alone=True)}
    settings |= {"data_identity": processed.data_identity(metadata)}

    with runs.held_output(output):
        if config.resume_from_checkpoint is None and runs.is_finished(
            output, settings, IGNORED_ON_RESUME, options.fresh
        ):
            if is_first_process():
                print(f"{output}/ holds the result of this run; --fresh trains anew.")
            push()
            return
        with reward_training.refused_settings(ValueError, ImportError):
            trainer = reward_training.PairTrainer(
                model=model,
                args=config,
                data_collator=reward_training.place_collator(
                    tokenizer.pad_token_id, config.pad_to_multiple_of, form_model if options.form_term else None
                ),
                train_dataset=train_pairs,
                eval_dataset=eval_pairs,
                processing_class=tokenizer,
                compute_metrics=reward_training.pair_accuracy,
                peft_config=get_peft_config(lora),
            )
        reward_training.keep_rewards_in_fp32(trainer)
        reward_training.keep_logs(trainer, output)
        first = trainer.is_world_process_zero()

        # --- training: the earlier run with these settings goes on, if there is one
        checkpoint = runs.checkpoint_to_resume(
            checkpoints, settings, IGNORED_ON_RESUME, options.fresh, config.resume_from_checkpoint, KEPT_BY_OPTIMIZER
        )
        if first:
            print(plan(settings, metadata, train_pairs, reward_training.pairs_per_update(config), updates))
            for edited in edited_constants(Path(__file__).with_name(DATA_SCRIPT), metadata.get("constants", {})):
                print(f"note           {edited}: the data is as it was, until the script runs again")
            if checkpoint:
                print(f"Resuming from {checkpoint} (--fresh starts over).")
        with stop_requests() as stop_requested:
            watch = reward_training.Watch(stop_requested)
            trainer.add_callback(watch)
            trainer.train(resume_from_checkpoint=checkpoint)
        step, last = trainer.state.global_step, trainer.state.max_steps
        if watch.interrupted and step < last:  # stopped in the very last update, the run is finished as any other
            if first:
                saved = f"Stopped at update {step} of {last}, checkpoint saved."
                print(f"{saved} The same command goes on; --fresh starts over.")
            sys.exit(130)

        # --- result: what was saved is what is evaluated, on the whole validation split, and only then put into place
        with runs.staging_directory(output) as staging:
            reward_training.save_trained(trainer, base.path, staging)
            evaluator = RewardModelEvaluator(str(staging), str(trainer.accelerator.device), mixed_precision=True)
            validation = processed.processed_pairs(splits, data_name, "validation")
            columns = pair_metrics.score_together(evaluator, validation, data_name)
            if first:
                metrics = {
                    **pair_metrics.pair_metrics(columns),
                    "source": metadata["source"],
                    "precision": evaluator.precision,
                    **reward_training.run_figures(trainer, watch),
                }
                reward_training.tell_trackers(trainer, metrics)
                log = trainer.state.log_history
                reward_training.write_reward_model(staging, columns, metrics, settings, metadata, log)
                runs.publish(staging, output)
                print(report(metrics, output))
        push()


def plan(
    settings: dict[str, Any], metadata: dict[str, Any], train_pairs: Any, pairs_per_update: int, updates: int
) -> str:
    """What the run is about to train on."""
    from reward_pipeline.reward_training import tokens_of

    limit = f"at most {metadata['max_length']} tokens a conversation"
    streamed = not hasattr(train_pairs, "num_rows")
    counted = "" if streamed else f"{len(train_pairs):,} pairs, {tokens_of(train_pairs):,} tokens, "
    return "\n".join(
        [
            f"base model     {settings['base_model']}",
            f"source         {metadata['source']}",
            f"training on    {'a stream of pairs, ' if streamed else counted}{limit}",
            f"among them     {settings['mismatched_share']:g} a pair with the answer to another prompt",
            f"form term      {'yes: the reward learns what form leaves over' if settings['form_term'] else 'no'}",
            f"updates        {updates:,} of {pairs_per_update} pairs",
        ]
    )


def report(metrics: dict[str, Any], output: Path) -> str:
    """The result in two lines."""
    from reward_pipeline.pair_metrics import metrics_line
    from reward_pipeline.reward_training import duration

    speed = f"{metrics['train_pairs_per_second']:.2f} pairs/s" if metrics["train_pairs_per_second"] else "no update"
    return f"{metrics_line(metrics)}\n{duration(metrics['train_seconds'])} in updates, {speed}; written to {output}/"


if __name__ == "__main__":
    run_script(main)
