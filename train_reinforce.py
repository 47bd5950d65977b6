"""Align the SFT model with the reward model: REINFORCE with a moving-average baseline (arXiv 2402.14740).

In:  prompts of `processed_helpsteer/`, the reward model in `reward_model_output/`, and the SFT model.
Out: `reinforce_output/`: the policy (a plain `from_pretrained` directory), `evaluation.json` (before and after, on
     unseen prompts), `samples.jsonl`, `samples.md`, `metrics.jsonl` (a line an update), `settings.json`, `plots/`,
     `README.md` (model card), `checkpoints/`.

    python train_reinforce.py
    python train_reinforce.py --steps 50 --kl_coefficient 0.1 --baseline ema --output_dir other_output
    python train_reinforce.py --reward_model judge_1 --second_judge judge_2
    python train_reinforce.py --reward_model none --reward_function reward_pipeline.constraints:kept \\
        --constrained_share 1 --output_dir constraints_output
    accelerate launch train_reinforce.py

A whole completion is one action. With reward model r, policy pi, frozen SFT reference pi_ref and baseline b

    R = r(x, y) - kl_coefficient * sum_t [log pi(y_t) - log pi_ref(y_t)] - missing_eos_penalty * [y did not end]
    loss = -mean((R - b) * sum_t log pi(y_t)), no gradient through R and b

Rewards are in standard deviations of the reward model on its validation split, without the form term: for a policy it
would be the easiest part to please. What is left out on purpose:

 1. no critic: b is one number, the average of earlier rewards, and not a second model that guesses them;
 2. no clipped ratios of probabilities, as in PPO: every completion serves for one update of the policy that gave it;
 3. no whitening: advantages divided by their spread would make much of small differences between alike completions;
 4. no groups: one completion a prompt, so that a batch has as many prompts as it can. Several, with the others' mean as
    the baseline of each, are there to compare with (--completions_per_prompt 4 --baseline leave_one_out);
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
from reward_pipeline.settings import Parser, apple_silicon, boolean, filled_text, or_none, real, seed_number, whole
from reward_pipeline.trl_flags import missing_tracker

if TYPE_CHECKING:
    from accelerate import Accelerator

ON_MPS = apple_silicon()  # where data and reward model are shorter by default

# ---------------------------------------------------------------------------------------------------------------------
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # SFT model: hub id or local directory
REWARD_MODEL = "./reward_model_output"  # written by train_reward_model.py, or a hub id; "none" for the function alone
DATA = "processed_helpsteer"  # directory written by load_helpsteer_dataset.py
OUTPUT_DIR = "reinforce_output"  # directory, made whole at the end
# prompts
MAX_PROMPT_LENGTH = 64 if ON_MPS else 128  # tokens, template included; longer prompts are left out
EVALUATION_PROMPTS = 256  # of the validation split, answered as they are and with a constraint
CONSTRAINED_SHARE = 0.0  # of the training prompts, joined with a constraint that a rule can check
# sampling
MAX_NEW_TOKENS = 48 if ON_MPS else 64  # tokens of a completion
TEMPERATURE = 1.0  # of sampling and of all log-probabilities
# optimisation
STEPS = 40  # updates
COMPLETIONS_PER_STEP = 32  # of all processes together
COMPLETIONS_PER_PROMPT = 1  # more at equal cost: so many times fewer prompts
MICRO_BATCH_SIZE = 8  # completions per forward and backward pass
LEARNING_RATE = 3e-5  # constant after the warm-up
WARMUP_STEPS = 6  # updates
MAX_GRAD_NORM = 1.0  # gradient clipping
# reward, in standard deviations of the reward model
BOUNDED_REWARD = False  # sigmoid of the difference to the SFT model's own answer instead
REWARD_FUNCTION = None  # "module:function" of TRL's signature, added to it
REWARD_FUNCTION_WEIGHT = 1.0  # what it is multiplied by
KL_COEFFICIENT = 0.05  # beta, per nat of the whole completion
MISSING_EOS_PENALTY = 1.0  # for a completion that did not end
BASELINE = "mean"  # of all previous steps; or "ema", "leave_one_out", or "none"
EMA_DECAY = 0.9  # of the "ema" baseline, per step
MAX_KL = 100.0  # nats of the whole completion; a mean above it stops the run
# rhythm
SAVE_STEPS = 25  # updates
REPORT_TO = "none"  # or a tracker of accelerate: "tensorboard", "wandb", ...
SEED = 42
# ---------------------------------------------------------------------------------------------------------------------

BASELINES = ("mean", "ema", "leave_one_out", "none")
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
    parser.flag(
        "reward_model", REWARD_MODEL, filled_text, "directory or hub id of the reward model; none: there is none"
    )
    parser.flag("second_judge", None, filled_text, "reward model that judges before and after, but does not train")
    parser.flag("data", DATA, filled_text, "directory written by load_helpsteer_dataset.py")
    parser.flag("output_dir", OUTPUT_DIR, filled_text, "directory for the policy")
    parser.flag("max_prompt_length", MAX_PROMPT_LENGTH, whole(MIN_MAX_LENGTH // 2), "tokens; longer ones are left out")
    parser.flag("evaluation_prompts", EVALUATION_PROMPTS, whole(1), "of the validation split")
    parser.flag("constrained_share", CONSTRAINED_SHARE, real(least=0, most=1), "of the training prompts")
    parser.flag("max_new_tokens", MAX_NEW_TOKENS, whole(1), "tokens of a completion")
    parser.flag("temperature", TEMPERATURE, real(least=0.01), "of sampling and of all log-probabilities")
    parser.flag("steps", STEPS, whole(1), "updates")
    parser.flag("completions_per_step", COMPLETIONS_PER_STEP, whole(1), "of all processes together")
    parser.flag("completions_per_prompt", COMPLETIONS_PER_PROMPT, whole(1), "at so many times fewer prompts")
    parser.flag("micro_batch_size", MICRO_BATCH_SIZE, whole(1), "completions per pass and device")
    parser.flag("learning_rate", LEARNING_RATE, real(above=0, most=1), "constant after the warm-up")
    parser.flag("warmup_steps", WARMUP_STEPS, whole(0), "updates")
    parser.flag("max_grad_norm", MAX_GRAD_NORM, real(above=0), "gradient clipping")
    parser.flag("bounded_reward", BOUNDED_REWARD, boolean, "sigmoid of the difference to the SFT model's answer")
    parser.flag("reward_function", REWARD_FUNCTION, or_none(filled_text), "module:function, added to the reward")
    parser.flag("reward_function_weight", REWARD_FUNCTION_WEIGHT, real(), "what it is multiplied by")
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

    judged, several = options.reward_model != "none", options.completions_per_prompt > 1
    if not judged and (options.bounded_reward or not options.reward_function):
        parser.error("--reward_model none: give a --reward_function alone, without --bounded_reward true")
    if options.baseline == "leave_one_out" and not several:
        parser.error("--baseline leave_one_out: the others are none; give --completions_per_prompt 4")
    if options.completions_per_step % options.completions_per_prompt:
        parser.error("--completions_per_step: must be a multiple of --completions_per_prompt")
    if missing := missing_tracker([options.report_to]):
        parser.error(f"--report_to: {missing} is not installed; pip install {missing}")
    return options


def main() -> None:
    options = parse_options()

    # Only now, since torch and its kin take seconds to load: a wrong flag has been answered by then.
    import torch
    from accelerate.utils import gather_object
    from tqdm.auto import tqdm

    from reward_pipeline import (
        devices,
        models,
        policy_metrics,
        processed,
        reinforce,
        reward_functions,
        rollouts,
        runs,
        sampling,
    )
    from reward_pipeline.files import InputError, json_lines
    from reward_pipeline.prefix_sharing import share_prefixes
    from reward_pipeline.processes import stop_requests, together

    accelerator = start_accelerator(options)
    device, first = accelerator.device, accelerator.is_main_process
    process, processes = accelerator.process_index, accelerator.num_processes
    # No fp16: it would need a scaled loss, and small probabilities would become 0.
    dtype = torch.bfloat16 if devices.autocast_dtype(device) is torch.bfloat16 else None

    # --- prompts, judges, policy and reference: everything needed is found before anything is made
    output, checkpoints = Path(options.output_dir), Path(options.output_dir) / "checkpoints"
    judges = [name for name in (options.reward_model, options.second_judge) if name not in ("none", None)]
    runs.claim_output(output, [options.model, *judges], rewards=False)
    splits, metadata = processed.load_processed(options.data)
    sft = models.resolve_model(options.model)
    tokenizer = models.load_tokenizer(sft.path)
    lengths = options.max_prompt_length, options.max_new_tokens
    per_prompt = options.completions_per_prompt
    prompts_per_step = options.completions_per_step // per_prompt
    amounts = prompts_per_step, options.evaluation_prompts
    prompts, unseen = rollouts.read_prompts(splits, tokenizer, options.data, lengths[0], *amounts, options.seed)
    joined = partial(rollouts.constrained, tokenizer=tokenizer, max_length=lengths[0], seed=options.seed)
    prompts = joined(prompts, share=options.constrained_share, held_out=False)
    constrained = [prompt for prompt in joined(unseen, share=1, held_out=True) if prompt.constraint]
    load_judge = partial(policy_metrics.load_judge, device=device, validation=splits["validation"])
    judge, second_judge, function = None, None, None
    if options.reward_model != "none":
        judge = load_judge("reward_model", options.reward_model, [*prompts, *unseen], *lengths)
    if options.second_judge:
        second_judge = load_judge("second_judge", options.second_judge, unseen, *lengths)
    if options.reward_function:
        function = options.reward_function, reward_functions.load_reward_function(options.reward_function)
    # Both in evaluation mode: with dropout, log-probabilities would not be those of the distribution that was sampled.
    policy, reference = models.load_sft_model(sft.path), models.load_sft_model(sft.path).to(device)
    rollouts.check_room(policy, options.model, sum(lengths))
    if device.type == "cpu":
        for model in (policy, reference):
            share_prefixes(model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=options.learning_rate, weight_decay=0.0)
    # Under DDP `prepared` is a wrapper that averages gradients; `policy` is the model in it, which can generate.
    prepared, optimizer = accelerator.prepare(policy, optimizer)
    end_ids = models.end_token_ids(policy, tokenizer)
    config = sampling.sampling_config(options.max_new_tokens, options.temperature, end_ids, tokenizer.pad_token_id)
    sample = partial(sampling.sample, tokenizer=tokenizer, config=config, dtype=dtype)
    sft_seeds = dict(
        zip([each.place for each in prompts], reinforce.random_seeds(len(prompts), options.seed, 0, 1), strict=True)
    )

    settings = vars(options) | {"evaluation_batch_size": EVALUATION_BATCH_SIZE, "processes": processes}
    settings |= {"base_model": sft.origin}
    settings |= together(
        lambda: {
            "base_weights": models.weights_digest(sft.path),
            "reward_identity": judge and policy_metrics.judge_identity(judge),
            "second_judge_identity": second_judge and policy_metrics.judge_identity(second_judge),
        },
        first_alone=True,
    )
    settings |= {"source": metadata["source"], "data_identity": processed.data_identity(metadata)}
    # Judged by the model that it was trained to please, the policy has its result confirmed whatever it learned.
    if judge and settings["second_judge_identity"] == settings["reward_identity"]:
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
        batches = rollouts.batches(prompts, prompts_per_step, options.seed)
        remaining = zip(range(1, options.steps + 1), batches, strict=False)
        bar = tqdm(initial=done, total=options.steps, desc="REINFORCE", unit=" updates", disable=not first)
        spoiled = reinforce.without_spoiled_checkpoint(checkpoints, log, first)
        with stop_requests() as stop_requested, bar, spoiled:
            for step, batch in itertools.islice(remaining, done, None):
                started = time.perf_counter()
                # This process's share, by length: in micro-batches of similar prompts little is padding.
                asked = sorted(batch[process::processes], key=lambda prompt: len(prompt.ids))
                batch = [prompt for prompt in asked for _ in range(per_prompt)]

                # Sample. The seeds follow from these three numbers, not from what was drawn before, so a resumed run
                # draws what an undisturbed one would have drawn.
                seeds = reinforce.random_seeds(len(batch), options.seed, step, process)
                completions = together(partial(sample, policy, prompts=batch, seeds=seeds))

                # Score: the judge reads the whole completion and gives one number for it, and a function another one.
                parts_of = partial(reward_functions.parts_of_rewards, judge=judge, function=function)
                parts = together(partial(parts_of, batch, completions.texts, form_model=metadata["form_model"]))
                parts = {name: torch.tensor(part, dtype=torch.float32, device=device) for name, part in parts.items()}
                scores = parts.get("judge", torch.zeros(len(batch), device=device))
                if options.bounded_reward:
                    # One answer of the SFT model to each prompt, the same whenever the prompt comes.
                    seeds = [sft_seeds[prompt.place] for prompt in asked]
                    answers = together(partial(sample, reference, prompts=asked, seeds=seeds))
                    judged = together(partial(judge.reward_function, [each.messages for each in asked], answers.texts))
                    of_sft = torch.tensor(judged, device=device).repeat_interleave(per_prompt)
                    scores = reward_functions.bounded(scores, of_sft, judge.members[0].std)
                if function:
                    scores = scores + options.reward_function_weight * parts["function"]

                # Baseline: from earlier steps alone. If it depended on these completions, the gradient would be biased.
                # Nothing came before the first step, so there its own mean R has to serve; the KL is still 0.
                kl = torch.zeros_like(scores)
                rewards = reinforce.regularised_rewards(scores, kl, completions.ended, 0.0, options.missing_eos_penalty)
                own_mean = float(accelerator.reduce(rewards.mean(), "mean"))
                baseline = reinforce.baseline_value(options.baseline, baseline_state, own_mean, options.ema_decay)

                # Loss and gradient, in micro-batches: the logits of all completions at once would need gigabytes.
                rows, size = [], max(options.micro_batch_size // per_prompt, 1) * per_prompt  # of whole prompts
                for start in range(0, len(batch), size):
                    part = completions.part(start, size)
                    own = slice(start, start + len(part.texts))
                    # Processes exchange their gradients once an update: with the last micro-batch.
                    with contextlib.nullcontext() if own.stop == len(batch) else accelerator.no_sync(prepared):
                        likely = reinforce.token_distributions(prepared, part, options.temperature, dtype)
                        log_probs, entropy = reinforce.log_probabilities(likely, part), reinforce.entropies(likely)
                        with torch.no_grad():
                            likely = reinforce.token_distributions(reference, part, options.temperature, dtype)
                            others = reinforce.log_probabilities(likely, part)
                        kl = reinforce.sequence_kl(log_probs.detach(), others, part.mask)
                        rewards = reinforce.regularised_rewards(
                            scores[own], kl, part.ended, options.kl_coefficient, options.missing_eos_penalty
                        )
                        if options.baseline == "leave_one_out":
                            advantages = rewards - reinforce.leave_one_out(rewards, per_prompt)
                        else:
                            advantages = rewards - baseline
                        loss = reinforce.reinforce_loss(log_probs, part.mask, advantages)
                        # Weighted by its share of the completions, since the last micro-batch may be a smaller one.
                        accelerator.backward(loss * len(part.texts) / len(batch))
                    logged = [each[own] for each in parts.values()]
                    figures = scores[own], rewards, advantages, kl, entropy, logged
                    rows.append(reinforce.completion_figures(part, *figures))

                # Check, before the step: a NaN in the weights could not be undone, and Adam's moments would keep it.
                table = torch.cat(rows)
                figures = reinforce.step_figures(accelerator.gather(table), parts)
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
                shown = rollouts.sample_row(batch, completions, scores, step % len(batch))
                log.append({"step": step, **figures, "sample": shown})
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
        alike = {"config": config, "dtype": dtype, "seed": options.seed}
        alike |= {"batch_size": EVALUATION_BATCH_SIZE, "micro_batch_size": options.micro_batch_size}
        answers_of = partial(rollouts.answers_of, accelerator, tokenizer, **alike)
        before = answers_of(reference, reference=None, prompts=unseen, title="Answers before")
        kept_before = answers_of(reference, reference=None, prompts=constrained, title="with constraints")
        with reinforce.without_spoiled_checkpoint(checkpoints, log, first):
            after = answers_of(policy, reference=reference, prompts=unseen, title="Answers after")
            reinforce.check_figures({"kl": float(after.kl.mean())}, options.steps, options.max_kl)
            kept_after = answers_of(policy, reference=None, prompts=constrained, title="with constraints")

        # --- result: made whole, and only then put into place
        with runs.staging_directory(output) as staging:
            if first:
                sides = unseen, (before, after), constrained, (kept_before, kept_after)
                outcome = policy_metrics.outcome(*sides, judge, second_judge, function, metadata["form_model"])
                results = outcome.results
                with models.quiet_transformers():
                    policy.save_pretrained(staging)
                    models.save_tokenizer(tokenizer, staging, policy)
                policy_metrics.write_policy_results(staging, outcome, settings, log)
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
    if options.completions_per_step // options.completions_per_prompt % accelerator.num_processes:
        raise InputError(
            f"--completions_per_step {options.completions_per_step} can not be divided among "
            f"{accelerator.num_processes} processes"
        )
    return accelerator


def plan(options: argparse.Namespace, base: str, source: str, prompts: int, checkpoint: str | None) -> str:
    """What the run is about to do."""
    lines = [
        f"SFT model   {base}",
        f"judge       {options.reward_model}" + (f", and {options.reward_function}" if options.reward_function else ""),
        f"prompts     {prompts:,} of at most {options.max_prompt_length} tokens, from {source}",
        f"updates     {options.steps:,} of {options.completions_per_step} completions of at most "
        f"{options.max_new_tokens} tokens",
    ]
    return "\n".join([*lines, f"Resuming from {checkpoint} (--fresh starts over)."] if checkpoint else lines)


def report(results: dict, output: Path) -> str:
    """The result in some lines."""
    from reward_pipeline.cards import SHOWN_MARKS
    from reward_pipeline.pair_metrics import difference, span

    lines = [f"{results['n']} unseen prompts, before -> after, 95 % intervals"]
    for name, prefix in (("reward", ""), ("second judge", "second_judge_"), ("function", "function_")):
        if results[f"{prefix}win_rate"] is not None:
            lines.append(
                f"{name:13} {results[f'{prefix}reward_before']:+.3f} -> {results[f'{prefix}reward_after']:+.3f}, gain "
                f"{results[f'{prefix}reward_gain']:+.3f} ({span(results[f'{prefix}reward_gain_interval'])}), at equal "
                f"form {results[f'{prefix}reward_gain_at_equal_form']:+.3f} "
                f"({span(results[f'{prefix}reward_gain_at_equal_form_interval'])}), win rate "
                f"{results[f'{prefix}win_rate']:.3f} ({span(results[f'{prefix}win_rate_interval'])})"
            )
    form, constraints = results["form_counts"], results["constraint_kinds"]
    lines.append(
        f"form model    {results['form_score_before']:+.3f} -> {results['form_score_after']:+.3f}; answers with "
        + ", ".join(f"{name} {form[name]['answers_before']} -> {form[name]['answers_after']}" for name in SHOWN_MARKS)
    )
    if constraints:
        lines.append(
            f"constraints   {results['constraint_pass_before']:.3f} -> {results['constraint_pass_after']:.3f} kept, "
            f"gain {difference(results['constraint_pass_gain'], results['constraint_pass_gain_interval'])}, "
            f"n = {results['constraint_n']}; without being asked {results['constraint_unasked_before']:.3f} -> "
            f"{results['constraint_unasked_after']:.3f}"
        )
    lines.append(
        f"length x {results['length_ratio']:.2f}, distinct 3-grams x {results['distinct3_ratio']:.2f}, ended "
        f"{results['ended_before']:.2f} -> {results['ended_after']:.2f}, KL {results['kl']:.2f} nats"
    )
    return "\n".join([*lines, f"written to {output}/"])


if __name__ == "__main__":
    run_script(main)
