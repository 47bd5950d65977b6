"""Speed of a REINFORCE update against a plain loop of `generate` and forward passes in fp32.

In:  `processed_helpsteer/`, a trained reward model, and the SFT model.
Out: a table on the terminal and, with `--json`, a file with all figures.

    python benchmarks/reinforce_speed.py
    python benchmarks/reinforce_speed.py --completions 32 --max_new_tokens 32 --json reinforce_speed.json

Both sample as many completions for the same prompts, score them, and update the policy once a turn. They do not sample
the same ones, so rates are per token.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure
from reward_pipeline import reinforce, rollouts, sampling
from reward_pipeline.devices import keep_freed_memory, pick_device
from reward_pipeline.models import (
    end_token_ids,
    load_sft_model,
    load_tokenizer,
    load_trained_reward_model,
    resolve_model,
)
from reward_pipeline.processed import load_processed
from reward_pipeline.processes import run_script
from reward_pipeline.settings import filled_text, whole

# Operations a parameter and token of a completion: sampling, judge and reference go forward, the gradient back as well.
OPERATIONS = 3 * measure.FORWARD + measure.TRAINING
COMPLETIONS = 16  # an update; with the 32 of `train_reinforce.py` both contenders together need 24 GiB
ENDLESS = 10**6  # updates


class Run(NamedTuple):
    """What an update of `train_reinforce.py` works with, but for its judge."""

    prompts: list[rollouts.PolicyPrompt]
    tokenizer: Any
    policy: Any
    reference: Any
    sampling: GenerationConfig


def open_run(options: argparse.Namespace, policy: str | None = None) -> Run:
    """As `train_reinforce.py` does it.

    Args:
        options: those of the script.
        policy: directory; by default the policy is the SFT model.
    """
    device = pick_device()
    if device.type == "cpu":
        keep_freed_memory()
    splits, _ = load_processed(options.data)
    path = resolve_model(options.model).path
    tokenizer = load_tokenizer(path)
    amounts = options.max_prompt_length, options.completions_per_step, options.evaluation_prompts
    prompts, _ = rollouts.read_prompts(splits, tokenizer, options.data, *amounts, options.seed)
    models = [load_sft_model(each).to(device) for each in (policy or path, path)]
    end_ids = end_token_ids(models[1], tokenizer)
    config = sampling.sampling_config(options.max_new_tokens, options.temperature, end_ids, tokenizer.pad_token_id)
    return Run(prompts, tokenizer, *models, config)


def ours(turns, flags: list[str]) -> None:
    """The script itself. A turn lasts from where it takes the prompts of an update to where it takes the next ones."""
    figures: measure.Turn = {}
    batches, sample = rollouts.batches, sampling.sample

    def begin(batch):
        nonlocal figures
        figures = measure.next_turn(turns)
        return batch

    def timed_sample(*arguments, **options):
        started = time.perf_counter()
        completions = sample(*arguments, **options)
        seconds = time.perf_counter() - started
        figures.update(tokens=int(completions.mask.sum()), sampling_seconds=seconds)
        return completions

    rollouts.batches = lambda *arguments: map(begin, batches(*arguments))
    sampling.sample = timed_sample
    measure.run("train_reinforce", *flags, "--steps", ENDLESS, "--save_steps", ENDLESS)


def plain(turns, flags: list[str]) -> None:
    """The same update as one writes it down first: fp32, one batch, every step over everything."""
    options = measure.script("train_reinforce")["parse_options"](flags)
    prompts, tokenizer, policy, reference, config = open_run(options)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=options.learning_rate, weight_decay=0.0)
    _, judge = load_trained_reward_model(options.reward_model)
    judge.to(policy.device)
    tokenizer.padding_side = "left"
    batches = rollouts.batches(prompts, options.completions_per_step, options.seed)
    for figures, batch in zip(turns, batches, strict=False):
        inputs = tokenizer.pad({"input_ids": [prompt.ids for prompt in batch]}, return_tensors="pt").to(policy.device)
        width = inputs["input_ids"].shape[1]
        started = time.perf_counter()
        with torch.no_grad():
            ids = policy.generate(**inputs, generation_config=config)
        seconds = time.perf_counter() - started
        mask = reinforce.completion_mask(ids[:, width:], config.eos_token_id)
        attention = torch.cat([inputs["attention_mask"], mask.long()], dim=1)
        with torch.no_grad():
            rewards = judge(ids, attention_mask=attention, use_cache=False).logits[:, 0]
            reference_log_probs = log_probs(reference, ids, attention)[:, width - 1 :]
        policy_log_probs = log_probs(policy, ids, attention)[:, width - 1 :]
        kl = reinforce.sequence_kl(policy_log_probs.detach(), reference_log_probs, mask)
        advantages = rewards - options.kl_coefficient * kl
        reinforce.reinforce_loss(policy_log_probs, mask, advantages).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        figures |= {"tokens": int(mask.sum()), "sampling_seconds": seconds}


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
        "peak_memory": measure.most_memory(turns)
    }


def main() -> None:
    constants = measure.script("train_reinforce")
    parser = measure.parser(__doc__, rounds=5)
    parser.flag("data", constants["DATA"], filled_text, "directory written by load_helpsteer_dataset.py")
    parser.flag("reward_model", constants["REWARD_MODEL"], filled_text, "directory written by train_reward_model.py")
    parser.flag("completions", COMPLETIONS, whole(1), "an update")
    parser.flag("max_new_tokens", constants["MAX_NEW_TOKENS"], whole(1), "tokens of a completion")
    options = parser.parse_args()
    machine = measure.machine()
    with tempfile.TemporaryDirectory() as directory:
        flags = ["--data", options.data, "--reward_model", options.reward_model, "--output_dir", directory]
        flags += ["--completions_per_step", str(options.completions), "--max_new_tokens", str(options.max_new_tokens)]
        results = measure.take_turns({"ours": (ours, (flags,)), "plain": (plain, (flags,))}, options.rounds)
    print(measure.describe_machine(machine))
    parameters = measure.body_parameters(load_sft_model(resolve_model(constants["MODEL"]).path))
    # `train_reinforce.py` does not use fp16.
    own = torch.bfloat16 if measure.own_dtype() is torch.bfloat16 else torch.float32
    dtypes = {"ours": own, "plain": torch.float32}
    rows, summary = [], {}
    for name, turns in results.items():
        each = summary[name] = rates(turns)
        rate = measure.rate_in(dtypes[name], machine)
        each["rate_share"] = OPERATIONS * parameters * each["tokens_per_second"] / rate
        # They sample different completions, so what counts is tokens per second.
        each["ours_is_faster"] = measure.faster_by(results["ours"], turns)
        figures = (f"{each[f'{kind}tokens_per_second']:.0f}" for kind in ("", "sampled_", "trained_"))
        memory = measure.gibibytes(each["peak_memory"])
        rows.append([name, *figures, f"{each['rate_share']:.2f}", memory, f"{each['ours_is_faster']:.2f}"])
    header = ["", "tokens/s", "while sampling", "for the rest", "share of the rate", "peak memory", "ours is faster by"]
    measure.print_table(header, rows)
    measure.write_figures(options.json, {"machine": machine, "summary": summary, "turns": results})


if __name__ == "__main__":
    run_script(main)
