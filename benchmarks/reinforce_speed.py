"""Speed of a REINFORCE update against a plain loop of `generate` and forward passes in fp32.

In:  `processed_helpsteer/`, a trained reward model, and the SFT model.
Out: a table on the terminal and, with `--json`, a file with all figures.

    python benchmarks/reinforce_speed.py
    python benchmarks/reinforce_speed.py --completions 32 --max_new_tokens 32 --json reinforce_speed.json

Both sample as many completions for the same prompts, score them, and update the policy once a turn. They do not sample
the same ones, so rates are per token.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_reinforce
from benchmarks import measure
from load_helpsteer_dataset import OUTPUT_DIR as DATA_DIR
from load_helpsteer_dataset import load_processed
from load_smollm_model import load_sft_model, load_trained_reward_model, resolve_model, run_script
from reward_model_demo import MODEL_PATH
from train_reinforce import Settings

# Operations a parameter and token of a completion: sampling, judge and reference go forward, the gradient back as well.
OPERATIONS = 3 * measure.FORWARD + measure.TRAINING
COMPLETIONS = 16  # an update; with the 32 of `train_reinforce.py` the plain loop needs more than 20 GB


def open_run(settings: Settings):
    accelerator = train_reinforce.build_accelerator(settings)
    splits, _ = load_processed(settings.data)
    return train_reinforce.build_run(settings, accelerator, splits, resolve_model(settings.model).path)


def timed(function: Callable, seconds: list[float]) -> Callable:
    """The function, which then also notes how long each call took."""

    def measured(*arguments, **options):
        started = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds.append(time.perf_counter() - started)

    return measured


def ours(turns, settings: Settings) -> None:
    run, sampling = open_run(settings), []
    train_reinforce.sample = timed(train_reinforce.sample, sampling)
    batches = train_reinforce.batches(run.prompts, settings.completions_per_step, settings.seed)
    for step, (figures, prompts) in enumerate(zip(turns, batches, strict=False), start=1):
        entry = train_reinforce.take_step(run, step, prompts, {})
        figures |= {"tokens": entry["length"] * settings.completions_per_step, "sampling_seconds": sampling[-1]}


def plain(turns, settings: Settings) -> None:
    """The same update as one writes it down first: fp32, one batch, every step over everything."""
    run, sampling = open_run(settings), []
    tokenizer, policy, reference = run.tokenizer, run.policy, run.reference
    generate = timed(policy.generate, sampling)
    _, judge = load_trained_reward_model(settings.reward_model)
    judge.to(policy.device)
    tokenizer.padding_side = "left"
    batches = train_reinforce.batches(run.prompts, settings.completions_per_step, settings.seed)
    for figures, prompts in zip(turns, batches, strict=False):
        inputs = tokenizer.pad({"input_ids": [prompt.ids for prompt in prompts]}, return_tensors="pt").to(policy.device)
        width = inputs["input_ids"].shape[1]
        with torch.no_grad():
            ids = generate(**inputs, generation_config=run.sampling)
        mask = train_reinforce.completion_mask(ids[:, width:], run.sampling.eos_token_id)
        attention = torch.cat([inputs["attention_mask"], mask.long()], dim=1)
        with torch.no_grad():
            rewards = judge(ids, attention_mask=attention, use_cache=False).logits[:, 0]
            reference_log_probs = log_probs(reference, ids, attention)[:, width - 1 :]
        policy_log_probs = log_probs(policy, ids, attention)[:, width - 1 :]
        kl = train_reinforce.sequence_kl(policy_log_probs.detach(), reference_log_probs, mask)
        advantages = rewards - settings.kl_coefficient * kl
        train_reinforce.reinforce_loss(policy_log_probs, mask, advantages).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
        run.optimizer.step()
        run.optimizer.zero_grad()
        figures |= {"tokens": int(mask.sum()), "sampling_seconds": sampling[-1]}


def log_probs(model, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, L - 1) log-probabilities of all tokens but the first."""
    logits = model(ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
    return logits.log_softmax(dim=-1).gather(2, ids[:, 1:, None]).squeeze(2)


def rates(turns: list[measure.Turn]) -> dict[str, float]:
    """Median tokens per second of whole updates, of sampling alone, and of scoring and training alone."""
    seconds = {
        "": [turn["seconds"] for turn in turns],
        "sampled_": [turn["sampling_seconds"] for turn in turns],
        "trained_": [turn["seconds"] - turn["sampling_seconds"] for turn in turns],
    }
    tokens = [turn["tokens"] for turn in turns]
    return {f"{kind}tokens_per_second": measure.rate(tokens, spent) for kind, spent in seconds.items()} | {
        "peak_memory": max(turn["peak_memory"] for turn in turns)
    }


def ratio(ours: list[measure.Turn], theirs: list[measure.Turn]) -> float:
    """Tokens per second of the one divided by those of the other, the median over the rounds."""
    one, other = ([turn["tokens"] / turn["seconds"] for turn in turns] for turns in (ours, theirs))
    return statistics.median(own / their for own, their in zip(one, other, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=DATA_DIR, help="default: %(default)s")
    parser.add_argument("--reward_model", default=MODEL_PATH, help="default: %(default)s")
    parser.add_argument(
        "--completions", type=measure.above_zero, default=COMPLETIONS, help="an update (default: %(default)s)"
    )
    length = Settings().max_new_tokens
    parser.add_argument("--max_new_tokens", type=measure.above_zero, default=length, help="default: %(default)s")
    parser.add_argument("--rounds", type=measure.above_zero, default=5, help="updates each (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    machine = measure.machine()
    with tempfile.TemporaryDirectory() as directory:
        settings = Settings(
            data=options.data,
            reward_model=options.reward_model,
            output_dir=directory,
            completions_per_step=options.completions,
            max_new_tokens=options.max_new_tokens,
        )
        results = measure.take_turns({"ours": (ours, (settings,)), "plain": (plain, (settings,))}, options.rounds)
    print(measure.describe_machine(machine))
    parameters = measure.body_parameters(load_sft_model(resolve_model(settings.model).path))
    # `train_reinforce.py` does not use fp16.
    own = torch.bfloat16 if measure.own_dtype() is torch.bfloat16 else torch.float32
    dtypes = {"ours": own, "plain": torch.float32}
    rows, summary = [], {}
    for name, turns in results.items():
        each = summary[name] = rates(turns)
        rate = measure.rate_in(dtypes[name], machine)
        each["rate_share"] = OPERATIONS * parameters * each["tokens_per_second"] / rate
        each["ours_is_faster"] = ratio(results["ours"], turns)
        figures = (f"{each[f'{kind}tokens_per_second']:.0f}" for kind in ("", "sampled_", "trained_"))
        memory = f"{each['peak_memory'] / 2**30:.1f} GiB"
        rows.append([name, *figures, f"{each['rate_share']:.2f}", memory, f"{each['ours_is_faster']:.2f}"])
    header = ["", "tokens/s", "while sampling", "for the rest", "share of the rate", "peak memory", "ours is faster by"]
    measure.print_table(header, rows)
    measure.write_figures(options.json, {"machine": machine, "summary": summary, "turns": results})


if __name__ == "__main__":
    run_script(main)
