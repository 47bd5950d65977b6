"""Scripts killed by SIGKILL at five moments: the same command goes on, and ends as an undisturbed run."""

import functools
import importlib
import itertools
import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_pairs, same_weights, save_reward_model
from datasets import load_from_disk
from torch.optim.optimizer import register_optimizer_step_pre_hook

import load_smollm_model

# Children are forked from a server that has imported everything: a start costs milliseconds, not the imports.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["train_reward_model", "train_reinforce"])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_update(number: int) -> None:
    """Die between the gradient and the step of the so many-th update from now."""
    updates = itertools.count(1)
    register_optimizer_step_pre_hook(lambda *rest: die() if next(updates) == number else None)


def die_while_saving(number: int) -> None:
    """Die in the middle of the so many-th file with an optimiser's state from now."""
    save, saved = torch.save, itertools.count(1)

    def half(content, path, **options):
        save(content, path, **options)
        if Path(path).name == "optimizer.pt" and next(saved) == number:
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    torch.save = half


def die_at_call(script: str, function: str, number: int) -> None:
    """Die when a function of a script is called for the so many-th time."""
    module, calls = importlib.import_module(script), itertools.count(1)
    real = getattr(module, function)

    def mortal(*rest, **options):
        if next(calls) == number:
            die()
        return real(*rest, **options)

    setattr(module, function, mortal)


def run(script: str, arguments: list[str], death) -> None:
    """Body of a child."""
    torch.set_num_threads(1)
    module = importlib.import_module(script)
    sys.argv = [f"{script}.py", *arguments]
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    death()
    load_smollm_model.run_script(module.main)


def run_to_its_end(script: str, arguments: list[str]) -> None:
    assert exit_code(script, arguments, int) == 0


def run_to_its_death(script: str, arguments: list[str], death, *details) -> None:
    assert exit_code(script, arguments, functools.partial(death, *details)) == -signal.SIGKILL


def exit_code(script: str, arguments: list[str], death) -> int:
    process = context.Process(target=run, args=(script, arguments, death))
    process.start()
    process.join(timeout=300)
    return process.exitcode


def kill_five_times(script: str, arguments: list[str], every: int) -> None:
    """Kill a run at four random updates, first before any checkpoint, and once while a checkpoint is written."""
    moments = random.Random(0)
    run_to_its_death(script, arguments, die_at_update, moments.randint(1, every))
    for _ in range(3):
        run_to_its_death(script, arguments, die_at_update, moments.randint(every + 1, 2 * every))
    run_to_its_death(script, arguments, die_while_saving, 2)


@pytest.fixture
def judge(tmp_path, tiny_model, tokenizer) -> str:
    directory = save_reward_model(tmp_path / "judge", tiny_model, tokenizer, 0.5, 64)
    config = Path(directory) / "config.json"
    config.write_text(
        config.read_text().replace('"reward_max_length"', '"reward_mean": 0, "reward_std": 1, "reward_max_length"')
    )
    return directory


def test_training(processed, tiny_model, tmp_path):
    arguments = [
        "--model", tiny_model, "--data", processed, "--bf16", "false", "--disable_tqdm", "true", "--num_train_epochs",
        "16", "--eval_strategy", "no", "--load_best_model_at_end", "false", "--save_steps", "10", "--output_dir",
    ]  # fmt: skip
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    run_to_its_end("train_reward_model", [*arguments, str(undisturbed)])
    kill_five_times("train_reward_model", [*arguments, str(killed)], every=10)
    assert not (killed / "config.json").exists()
    run_to_its_end("train_reward_model", [*arguments, str(killed)])
    assert same_weights(killed, undisturbed)


def test_reinforce(processed, tiny_model, judge, tmp_path):
    arguments = [
        "--model", tiny_model, "--data", processed, "--reward_model", judge, "--max_prompt_length", "32",
        "--max_new_tokens", "4", "--completions_per_step", "4", "--steps", "20", "--save_steps", "2",
        "--learning_rate", "1e-3", "--max_kl", "1e9", "--output_dir",
    ]  # fmt: skip
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    run_to_its_end("train_reinforce", [*arguments, str(undisturbed)])
    kill_five_times("train_reinforce", [*arguments, str(killed)], every=2)
    assert not (killed / "config.json").exists()
    run_to_its_end("train_reinforce", [*arguments, str(killed)])
    assert same_weights(killed, undisturbed)
    assert (killed / "evaluation.json").read_text() == (undisturbed / "evaluation.json").read_text()


def test_preparation(tiny_model, write_jsonl, tmp_path):
    script = "load_helpsteer_dataset"
    arguments = ["--source", write_jsonl(make_pairs(3000)), "--model", tiny_model, "--max_length", "64", "--output"]
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    run_to_its_end(script, [*arguments, str(undisturbed)])
    moments = random.Random(0)
    calls = {"check_pair": 3000, "encode_batch": 4, "digest": 1, "write_text": 1}
    for function in ("check_pair", *calls):
        number = moments.randint(1, calls[function])
        run_to_its_death(script, [*arguments, str(killed)], die_at_call, script, function, number)
        assert not killed.exists()
    run_to_its_end(script, [*arguments, str(killed)])
    ours, theirs = load_from_disk(str(killed)), load_from_disk(str(undisturbed))
    assert {name: split[:] for name, split in ours.items()} == {name: split[:] for name, split in theirs.items()}
    assert [path.name for path in tmp_path.glob(".killed*")] == []
