"""Align the SFT model with the reward model: REINFORCE with a moving-average baseline (arXiv 2402.14740).

In:  prompts of `processed_helpsteer/`, the reward model in `reward_model_output/`, and the SFT model.
Out: `reinforce_output/`: the policy (a plain `from_pretrained` directory), `evaluation.json` (before and after, on
     unseen prompts), `samples.jsonl`, `samples.md`, `metrics.jsonl` (a line an update), `settings.json`, `plots/`,
     `README.md` (model card), `checkpoints/`.

    python train_reinforce.py
    python train_reinforce.py --steps 50 --kl_coefficient 0.1 --baseline ema --output_dir other_output
    python train_reinforce.py --reward_model judge_1 --second_judge judge_2
    accelerate launch train_reinforce.py

A whole completion is one action. With reward model r, policy pi, frozen SFT reference pi_ref and baseline b

    R = r(x, y) - kl_coefficient * sum_t [log pi(y_t) - log pi_ref(y_t)] - missing_eos_penalty * [y did not end]
    loss = -mean((R - b) * sum_t log pi(y_t)), no gradient through R and b

Rewards are in standard deviations of the reward model on its validation split. What is left out on purpose:

 1. no critic: b is one number, the average of earlier rewards, and not a second model that guesses them;
 2. no clipped ratios of probabilities, as in PPO: every completion serves for one update of the policy that gave it;
 3. no whitening: advantages divided by their spread would make much of small differences between alike completions;
 4. no leave-one-out and no groups: one completion a prompt, so that a batch has as many prompts as it can;
 5. no KL in the loss: it is part of the reward, where its gradient is right in expectation.

A stopped run goes on by the same command; `--fresh` starts over.
"""

import argparse
import contextlib
import itertools
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from reward_pipeline.conversations import MIN_MAX_LENGTH
from reward_pipeline.processes import run_script
from reward_pipeline.settings import Parser, apple_silicon, boolean, filled_text, real, seed_number, whole
from reward_pipeline.trl_flags import missing_tracker

if TYPE_CHECKING:
    from accelerate import Accelerator

ON_MPS = apple_silicon()  # where data and reward model are shorter by default

# ---------------------------------------------------------------------------------------------------------------------
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # SFT model: hub id or local directory
REWARD_MODEL = "./reward_model_output"  # written by train_reward_model.py, or a hub id
DATA = "processed_helpsteer"  # directory written by load_helpsteer_dataset.py
OUTPUT_DIR = "reinforce_output"  # directory, made whole at the end
# prompts
MAX_PROMPT_LENGTH = 64 if ON_MPS else 128  # tokens, template included; longer prompts are left out
EVALUATION_PROMPTS = 256  # of the validation split
# sampling
MAX_NEW_TOKENS = 48 if ON_MPS else 64  # tokens of a completion
TEMPERATURE = 1.0  # of sampling and of all log-probabilities
# optimisation
STEPS = 50  # updates
COMPLETIONS_PER_STEP = 32  # of all processes together, one for each prompt
MICRO_BATCH_SIZE = 8  # completions per forward and backward pass
LEARNING_RATE = 2e-5  # constant after the warm-up
WARMUP_STEPS = 6  # updates
MAX_GRAD_NORM = 1.0  # gradient clipping
# reward, in standard deviations of the reward model
KL_COEFFICIENT = 0.03  # beta, per nat of the whole completion
MISSING_EOS_PENALTY = 1.0  # for a completion that did not end
BASELINE = "mean"  # of all previous steps; or "ema", or "none"
EMA_DECAY = 0.9  # of the "ema" baseline, per step
MAX_KL = 100.0  # nats of the whole completion; a mean above it stops the run
# rhythm
SAVE_STEPS = 25  # updates
REPORT_TO = "none"  # or a tracker of accelerate: "tensorboard", "wandb", ...
SEED = 42
# ---------------------------------------------------------------------------------------------------------------------

BASELINES = ("mean", "ema", "none")
ACCELERATE_TRACKERS = ("none", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
CHECKPOINTS_KEPT = 2
EVALUATION_BATCH_SIZE = 32  # prompts answered at once

# Settings that do not change the result; pairs and weights are compared, wherever they lie.
IGNORED = {
    *("config", "fresh", "data", "output_dir", "report_to", "save_steps", "max_kl", "model", "base_model", "source"),
    *("reward_model", "second_judge"),
}
# Settings that do not change the updates: a checkpoint may be continued under others. More steps make a run longer.
IGNORED_ON_RESUME = IGNORED | {"steps", "second_judge_identity", "evaluation_prompts", "evaluation_batch_size"}


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Flags over constants."""
    parser = Parser(__doc__)
    parser.flag("model", MODEL, filled_text, "SFT model: hub id or local directory")
    parser.flag("reward_model", REWARD_MODEL, filled_text, "directory or hub id of the reward model")
    parser.flag("second_judge", None, filled_text, "reward model that judges before and after, but does not train")
    parser.flag("data", DATA, filled_text, "directory written by load_helpsteer_dataset.py")
    parser.flag("output_dir", OUTPUT_DIR, filled_text, "directory for the policy")
    parser.flag("max_prompt_length", MAX_PROMPT_LENGTH, whole(MIN_MAX_LENGTH // 2), "tokens; longer ones are left out")
    parser.flag("evaluation_prompts", EVALUATION_PROMPTS, whole(1), "of the validation split")
    parser.flag("max_new_tokens", MAX_NEW_TOKENS, whole(1), "tokens of a completion")
    parser.flag("temperature", TEMPERATURE, real(least=0.01), "of sampling and of all log-probabilities")
    parser.flag("steps", STEPS, whole(1), "updates")
    parser.flag("completions_per_step", COMPLETIONS_PER_STEP, whole(1), "of all processes together, one a prompt")
    parser.flag("micro_batch_size", MICRO_BATCH_SIZE, whole(1), "completions per pass and device")
    parser.flag("learning_rate", LEARNING_RATE, real(above=0, most=1), "constant after the warm-up")
    parser.flag("warmup_steps", WARMUP_STEPS, whole(0), "updates")
    parser.flag("max_grad_norm", MAX_GRAD_NORM, real(above=0), "gradient clipping")
    parser.flag("kl_coefficient", KL_COEFFICIENT, real(least=0), "beta, per nat of a completion")
    parser.flag("missing_eos_penalty", MISSING_EOS_PENALTY, real(least=0), "for a completion that did not end")
    parser.flag("baseline", BASELINE, str, "average of previous rewards", choices=BASELINES)
    parser.flag("ema_decay", EMA_DECAY, real(least=0, below=1), "of --baseline ema, per update")
    parser.flag("max_kl", MAX_KL, real(above=0), "nats of a completion; a mean above it stops the run")
    parser.flag("save_steps", SAVE_STEPS, whole(1), "updates between checkpoints")
    parser.flag("report_to", REPORT_TO, str, "a tracker of accelerate", choices=ACCELERATE_TRACKERS)
    parser.flag("seed", SEED, seed_number, "of the order of prompts and of sampling")
    parser.flag("fresh", False, boolean, "start over instead of resuming")
    options = parser.parse_args(arguments)

    if missing := missing_tracker([options.report_to]):
        parser.error(f"--report_to: {missing} is not installed; pip install {missing}")
    return options


def main() -> None:
    options = parse_options()

    # Only now, since torch and its kin take seconds to load: a wrong flag has been answered by then.
    import torch
    from accelerate.utils import gather_object
    from tqdm.auto import tqdm

    from reward_pipeline import devices, models, policy_metrics, processed, reinforce, rollouts, runs
    from reward_pipeline.files import InputError, json_lines
    from reward_pipeline.processes import stop_requests, together

    accelerator = start_accelerator(options)
    device, first = accelerator.device, accelerator.is_main_process
    process, processes = accelerator.process_index, accelerator.num_processes
    # No fp16: it would need a scaled loss, and small probabilities would become 0.
    dtype = torch.bfloat16 if devices.autocast_dtype(device) is torch.bfloat16 else None

    # --- prompts, judges, policy and reference: everything needed is found before anything is made
    output, checkpoints = Path(options.output_dir), Path(options.output_dir) / "checkpoints"
    needed = [options.model, options.reward_model, *filter(None, [options.second_judge])]
    runs.claim_output(output, needed, rewards=False)
    splits, metadata = processed.load_processed(options.data)
    sft = models.resolve_model(options.model)
    tokenizer = models.load_tokenizer(sft.path)
    lengths = options.max_prompt_length, options.max_new_tokens
    amounts = options.completions_per_step, options.evaluation_prompts
    prompts, unseen = rollouts.read_prompts(splits, tokenizer, options.data, lengths[0], *amounts, options.seed)
    load_judge = partial(policy_metrics.load_judge, device=device, validation=splits["validation"])
    judge = load_judge("reward_model", options.reward_model, [*prompts, *unseen], *lengths)
    second_judge = None
    if options.second_judge:
        second_judge = load_judge("second_judge", options.second_judge, unseen, *lengths)
    # Both in evaluation mode: with dropout, log-probabilities would not be those of the distribution that was sampled.
    policy, reference = models.load_sft_model(sft.path), models.load_sft_model(sft.path).to(device)
    rollouts.check_room(policy, options.model, sum(lengths))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=options.learning_rate, weight_decay=0.0)
    # Under DDP `prepared` is a wrapper that averages gradients; `policy` is the model in it, which can generate.
    prepared, optimizer = accelerator.prepare(policy, optimizer)
    end_ids = models.end_token_ids(policy, tokenizer)
    sampling = rollouts.sampling_config(options.max_new_tokens, options.temperature, end_ids, tokenizer.pad_token_id)

    settings = vars(options) | {"evaluation_batch_size": EVALUATION_BATCH_SIZE, "processes": processes}
    settings |= {"base_model": sft.origin}
    settings |= together(
        lambda: {
            "base_weights": models.weights_digest(sft.path),
            "reward_identity": policy_metrics.judge_identity(judge),
            "second_judge_identity": second_judge and policy_metrics.judge_identity(second_judge),
        },
        first_alone=True,
    )
    settings |= {"source": metadata["source"], "data_identity": processed.data_identity(metadata)}
    # Judged by the model that it was trained to please, the policy has its result confirmed whatever it learned.
    if settings["second_judge_identity"] == settings["reward_identity"]:
        raise InputError(f"--second_judge: {options.second_judge} has the weights of --reward_model; name another one")

    with runs.held_output(output):
        if runs.is_finished(output, settings, IGNORED, options.fresh, IGNORED_ON_RESUME):
            accelerator.print(f"{output}/ holds the result of this run; --fresh trains anew.")
            return

        # --- an earlier run with these settings goes on, if there is one
        checkpoint = runs.checkpoint_to_resume(checkpoints, settings, IGNORED_ON_RESUME, options.fresh)
        done, baseline_state = runs.load_policy_checkpoint(checkpoint, policy, optimizer)
        if done > options.steps:
            longer = f"has more updates than --steps {options.steps}; give more, or start over with --fresh"
            raise InputError(f"{checkpoint}: {longer}")
        log = together(lambda: runs.resume_log(checkpoints, done), first_alone=True)
        accelerator.print(plan(options, sft.origin, metadata["source"], len(prompts), checkpoint))
        if accelerator.log_with:
            accelerator.init_trackers("reinforce", config=vars(options))

        # --- the updates
        batches = rollouts.batches(prompts, options.completions_per_step, options.seed)
        remaining = zip(range(1, options.steps + 1), batches, strict=False)
        bar = tqdm(initial=done, total=options.steps, desc="REINFORCE", unit=" updates", disable=not first)
        spoiled = reinforce.without_spoiled_checkpoint(checkpoints, log, first)
        with stop_requests() as stop_requested, bar, spoiled:
            for step, batch in itertools.islice(remaining, done, None):
                started = time.perf_counter()
                # This process's share, by length: in micro-batches of similar prompts little is padding.
                batch = sorted(batch[process::processes], key=lambda prompt: len(prompt.ids))
                messages = [prompt.messages for prompt in batch]

                # Sample: one completion a prompt. The seed follows from these three numbers, not from what was drawn
                # before, so a resumed run draws what an undisturbed one would have drawn.
                own_seed = reinforce.step_seed(options.seed, step, process)
                completions = together(partial(rollouts.sample, policy, tokenizer, batch, sampling, dtype, own_seed))

                # Score: the reward model reads the whole completion and gives one number for it, for an empty one too.
                scores = together(partial(judge.reward_function, messages, completions.texts))
                scores = torch.tensor(scores, dtype=torch.float32, device=device)

                # Baseline: from earlier steps alone. If it depended on these completions, the gradient would be biased.
                # Nothing came before the first step, so there its own mean R has to serve; the KL is still 0.
                kl = torch.zeros_like(scores)
                rewards = reinforce.regularised_rewards(scores, kl, completions.ended, 0.0, options.missing_eos_penalty)
                own_mean = float(accelerator.reduce(rewards.mean(), "mean"))
                baseline = reinforce.baseline_value(options.baseline, baseline_state, own_mean, options.ema_decay)

                # Loss and gradient, in micro-batches: the logits of all completions at once would need gigabytes.
                rows = []
                for start in range(0, len(batch), options.micro_batch_size):
                    part = completions.part(start, options.micro_batch_size)
                    part_scores = scores[start : start + len(part.texts)]
                    # Processes exchange their gradients once an update: with the last micro-batch.
                    last = start + len(part.texts) == len(batch)
                    with contextlib.nullcontext() if last else accelerator.no_sync(prepared):
                        log_probs, entropy = reinforce.log_probabilities(prepared, part, options.temperature, dtype)
                        with torch.no_grad():
                            others, _ = reinforce.log_probabilities(reference, part, options.temperature, dtype)
                        kl = reinforce.sequence_kl(log_probs.detach(), others, part.mask)
                        rewards = reinforce.regularised_rewards(
                            part_scores, kl, part.ended, options.kl_coefficient, options.missing_eos_penalty
                        )
                        loss = reinforce.reinforce_loss(log_probs, part.mask, rewards - baseline)
                        # Weighted by its share of the completions, since the last micro-batch may be a smaller one.
                        accelerator.backward(loss * len(part.texts) / len(batch))
                    rows.append(reinforce.completion_figures(part, part_scores, rewards, kl, entropy))

                # Check, before the step: a NaN in the weights could not be undone, and Adam's moments would keep it.
                table = torch.cat(rows)
                figures = reinforce.step_figures(accelerator.gather(table), baseline)
                norm = accelerator.clip_grad_norm_(prepared.parameters(), options.max_grad_norm)
                figures["gradient_norm"] = float(norm)
                places = reinforce.non_finite_places(table, [prompt.place for prompt in batch])
                reinforce.check_figures(figures, step, options.max_kl, gather_object(places))

                # Update, by a learning rate that follows from the step alone: there is no scheduler to resume.
                learning_rate = reinforce.warmed_up(options.learning_rate, options.warmup_steps, step)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                optimizer.step()
                optimizer.zero_grad()
                baseline_state = reinforce.updated_baseline(baseline_state, figures["reward"], options.ema_decay)

                # Log
                seconds = time.perf_counter() - started
                speed = figures["length"] * options.completions_per_step / seconds
                figures |= {"learning_rate": learning_rate, "seconds": seconds, "tokens_per_second": speed}
                sample = rollouts.sample_row(batch, completions, scores, step % len(batch))
                log.append({"step": step, **figures, "sample": sample})
                accelerator.log(figures, step=step)
                bar.set_postfix_str(f"score {figures['score']:+.2f}, KL {figures['kl']:.2f}, {speed:.0f} tokens/s")
                bar.update()

                # Save; asked to stop, all processes do so after the same update.
                stop = stop_requested()
                if first:
                    with (checkpoints / "metrics.jsonl").open("a", encoding="utf-8") as file:
                        file.write(json_lines(log[-1:]))
                    if stop or step % options.save_steps == 0 or step == options.steps:
                        state = step, baseline_state
                        runs.save_policy_checkpoint(checkpoints, *state, policy, optimizer, CHECKPOINTS_KEPT)
                accelerator.wait_for_everyone()
                if stop:
                    accelerator.print(f"Stopped at update {step} of {options.steps}, checkpoint saved.")
                    accelerator.print("The same command goes on; --fresh starts over.")
                    sys.exit(130)

        # --- before and after: the same prompts, which the training did not see, with the same random numbers
        alike = {"prompts": unseen, "config": sampling, "dtype": dtype, "seed": options.seed}
        alike |= {"batch_size": EVALUATION_BATCH_SIZE, "micro_batch_size": options.micro_batch_size}
        answers_of = partial(rollouts.answers_of, accelerator, tokenizer, reference, **alike)
        before = answers_of(reference, title="Answers before")
        with reinforce.without_spoiled_checkpoint(checkpoints, log, first):
            after = answers_of(policy, title="Answers after")
            reinforce.check_figures({"kl": float(after.kl.mean())}, options.steps, options.max_kl)

        # --- result: made whole, and only then put into place
        with runs.staging_directory(output) as staging:
            if first:
                judged = policy_metrics.compare_answers(judge, unseen, before, after)
                second = policy_metrics.compare_answers(second_judge, unseen, before, after) if second_judge else None
                results = policy_metrics.evaluation(before, after, judged, second)
                samples = policy_metrics.sample_rows(unseen, before, after, judged, second)
                with models.quiet_transformers():
                    policy.save_pretrained(staging)
                    models.save_tokenizer(tokenizer, staging, policy)
                policy_metrics.write_policy_results(staging, before, after, judged, results, samples, settings, log)
                runs.publish(staging, output)
                final = {f"final/{name}": value for name, value in results.items() if isinstance(value, int | float)}
                accelerator.log(final, step=options.steps)
                print(report(results, output))
        for each in accelerator.trackers:
            each.finish()


def start_accelerator(options: argparse.Namespace) -> "Accelerator":
    """Connect the processes, if there are several.

    Raises:
        InputError: they can not share the work.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    from reward_pipeline.devices import keep_freed_memory, pick_device
    from reward_pipeline.files import InputError

    on_cpu = pick_device().type == "cpu"
    if on_cpu:
        keep_freed_memory()  # before the first large block is allocated
    tracker = None if options.report_to == "none" else options.report_to
    # Mixed precision is this script's own, since policy and reference have to compute alike: for two models that are
    # the same, the KL must be 0.
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", log_with=tracker, project_dir=options.output_dir)
    # `generate` takes a whole model: FSDP and DeepSpeed would have to gather its parts anew for every token.
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise InputError(f"{accelerator.distributed_type.value}: completions are sampled from whole models; use DDP")
    if options.completions_per_step % accelerator.num_processes:
        raise InputError(
            f"--completions_per_step {options.completions_per_step} can not be divided among "
            f"{accelerator.num_processes} processes"
        )
    return accelerator


def plan(options: argparse.Namespace, base: str, source: str, prompts: int, checkpoint: str | None) -> str:
    """What the run is about to do."""
    lines = [
        f"SFT model   {base}",
        f"judge       {options.reward_model}",
        f"prompts     {prompts:,} of at most {options.max_prompt_length} tokens, from {source}",
        f"updates     {options.steps:,} of {options.completions_per_step} completions of at most "
        f"{options.max_new_tokens} tokens",
    ]
    return "\n".join([*lines, f"Resuming from {checkpoint} (--fresh starts over)."] if checkpoint else lines)


def report(results: dict, output: Path) -> str:
    """The result in some lines."""
    from reward_pipeline.pair_metrics import span

    lines = [f"{results['n']} unseen prompts, before -> after, 95 % intervals"]
    for name, prefix in (("reward", ""), ("second judge", "second_judge_")):
        if results[f"{prefix}win_rate"] is not None:
            lines.append(
                f"{name:13} {results[f'{prefix}reward_before']:+.3f} -> {results[f'{prefix}reward_after']:+.3f}, gain "
                f"{results[f'{prefix}reward_gain']:+.3f} ({span(results[f'{prefix}reward_gain_interval'])}), win rate "
                f"{results[f'{prefix}win_rate']:.3f} ({span(results[f'{prefix}win_rate_interval'])})"
            )
    lines.append(
        f"length x {results['length_ratio']:.2f}, distinct 3-grams x {results['distinct3_ratio']:.2f}, ended "
        f"{results['ended_before']:.2f} -> {results['ended_after']:.2f}, KL {results['kl']:.2f} nats"
    )
    return "\n".join([*lines, f"written to {output}/"])


if __name__ == "__main__":
    run_script(main)
