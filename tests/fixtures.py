"""Shared fixtures: the real tokenizer and model, tiny random models with that tokenizer, and pairs to feed them."""

import functools
import gc
import itertools
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # tests never wait for a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The processes that run tests are as many as the cores; and a forked child of one that computes in several threads
# would wait for threads that it does not have.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch
import tqdm
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import LlamaConfig, LlamaForCausalLM

from reward_pipeline import models

hypothesis.settings.register_profile("suite", max_examples=60, derandomize=True, deadline=None)
hypothesis.settings.load_profile("suite")

# One pair, plain and as HelpSteer2 has it.
USER = {"role": "user", "content": "Name a colour."}
PAIR = {"prompt": "Name a colour.", "chosen": "Red.", "rejected": "Seven."}
HUB_PAIR = {
    "prompt": "Name a colour.",
    "chosen": [USER, {"role": "assistant", "content": "Red."}],
    "chosen_rating": 3.2,
    "rejected": [USER, {"role": "assistant", "content": "Seven."}],
    "rejected_rating": 0.4,
}
SMALL_VOCABULARY = 10_000  # tokens; every text can still be written, by bytes

# Every training collects garbage, and would look through all that the libraries have made at their import.
gc.collect()
gc.freeze()


@pytest.fixture(scope="session")
def smollm() -> str:
    """Directory of the real SmolLM2-135M-Instruct."""
    return models.resolve_model().path


@pytest.fixture(scope="session")
def tokenizer(smollm):
    return models.load_tokenizer(smollm)


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory, smollm):
    """The real tokenizer with its first tokens and merges alone: it loads, and is saved, in a tenth of the time."""
    directory = tmp_path_factory.mktemp("small_tokenizer")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(smollm) / name, directory)
    steps = json.loads((Path(smollm) / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = {token: number for token, number in steps["model"]["vocab"].items() if number < SMALL_VOCABULARY}
    merges = [pair for pair in steps["model"]["merges"] if "".join(pair) in vocabulary]
    steps["model"] |= {"vocab": vocabulary, "merges": merges}
    (directory / "tokenizer.json").write_text(json.dumps(steps), encoding="utf-8")
    return models.load_tokenizer(str(directory))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, small_tokenizer) -> str:
    """Directory of a random two-layer Llama with `small_tokenizer`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(small_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    directory = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(directory)
    small_tokenizer.save_pretrained(directory)
    return str(directory)


def save_reward_model(directory, base: str, tokenizer, head_std: float, max_length: int, seed: int = 42) -> str:
    """Save `base` with a random head, as the training script saves a model."""
    model = models.load_reward_model(base, tokenizer.pad_token_id, seed)
    with torch.no_grad():
        model.score.weight.normal_(std=head_std)
    model.config.reward_max_length = max_length
    model.config.reward_format = models.REWARD_FORMAT
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def tiny_reward_model(tmp_path_factory, tiny_model, small_tokenizer) -> str:
    """Directory of a random reward model whose scores differ clearly from answer to answer."""
    return save_reward_model(tmp_path_factory.mktemp("tiny_reward"), tiny_model, small_tokenizer, 0.5, 128)


@pytest.fixture(scope="session")
def other_reward_model(tmp_path_factory, tiny_model, small_tokenizer) -> str:
    """Directory of a second random reward model, with another head and the figures that `normalize` needs."""
    directory = save_reward_model(tmp_path_factory.mktemp("other_reward"), tiny_model, small_tokenizer, 0.3, 64, seed=7)
    config = Path(directory) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"reward_mean": 1.5, "reward_std": 0.25}))
    return directory


@pytest.fixture
def write_jsonl(tmp_path):
    def write(rows, name="pairs.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own; call with mount options such as `size=1m` or `remount,size=9m`."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = []

    def mount(options: str):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory], capture_output=True)
        if done.returncode:
            pytest.skip("file systems can not be mounted here")
        mounted.append(options)
        return directory

    yield mount
    if mounted:
        subprocess.run(["umount", "--lazy", directory], check=True)


def make_pairs(count: int) -> list[dict]:
    """Easy pairs: the chosen answer names the number of the prompt, the rejected one declines."""
    return [
        {
            "prompt": f"Write the number {number} as digits.",
            "chosen": f"{number} it is, and {number + 1} comes next.",
            "rejected": f"No idea about {number}, ask somebody else please.",
        }
        for number in range(count)
    ]


class Poison:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def flip_a_bit(path) -> None:
    """Damage a file so that its length and most formats do not show it."""
    content = bytearray(Path(path).read_bytes())
    content[-9] ^= 1
    Path(path).write_bytes(content)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved model."""
    return load_file(directory / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    """Whether two saved models are bitwise the same."""
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


ROOT = Path(__file__).resolve().parents[1]


def run_main(script: str, monkeypatch, *arguments) -> None:
    """Run a script in this process under the given command line."""
    monkeypatch.setattr("sys.argv", [f"{script}.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")


@functools.cache
def names_of(script: str) -> dict:
    """Constants and functions of a script, which nothing imports."""
    return runpy.run_path(str(ROOT / f"{script}.py"), run_name=script)


def parse(script: str, *arguments):
    """The options that a script makes of a command line."""
    return names_of(script)["parse_options"](list(map(str, arguments)))


FORK = multiprocessing.get_context("fork")  # all is imported here: a start costs milliseconds, not the imports


def forked(script: str | Path, arguments, before=None, environment=None, output=os.devnull) -> multiprocessing.Process:
    """Start a script in a child of this process.

    Args:
        before: called in the child first, to change what the script will find.
        environment: variables of the child.
        output: file for what it prints.
    """
    process = FORK.Process(target=_child, args=(str(script), [*map(str, arguments)], before, environment or {}, output))
    process.start()
    return process


def _child(script: str, arguments: list[str], before, environment: dict[str, str], output) -> None:
    os.environ.update(environment)
    with open(output, "w") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    tqdm.tqdm.set_lock(threading.RLock())  # the inherited one may be held by a thread that was not forked
    AcceleratorState._reset_state(True)  # this process is one of several, whatever its parent is
    if before:
        before()
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        # A thread of gloo that outlives the script may free a tensor while the interpreter is being torn down, which
        # aborts the process: seldom, but more often on a busy machine. So they are counted, which fails every time.
        # FSDP has groups of its own, which nobody can close.
        threads = [thread.read_text().strip() for thread in Path("/proc/self/task").glob("*/comm")]
        assert "ACCELERATE_USE_FSDP" in os.environ or not [name for name in threads if "gloo" in name], threads


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


def killed(script: str, arguments, before) -> None:
    """Run a script that is killed by SIGKILL, as `before` has it."""
    child = forked(ROOT / f"{script}.py", arguments, before)
    child.join(timeout=120)
    assert child.exitcode == -signal.SIGKILL


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def in_processes(count: int, script: str | Path, *arguments, before=None, environment=None) -> str:
    """Run a script in several CPU processes that exchange by gloo, as `torchrun` does; returns what they print."""
    port = str(free_port())
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "ACCELERATE_USE_CPU": "true"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **(environment or {})}
    with tempfile.TemporaryDirectory() as directory:
        outputs = [Path(directory) / str(rank) for rank in range(count)]
        ranks = [
            forked(script, arguments, before, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, output)
            for rank, output in enumerate(outputs)
        ]
        for rank in ranks:
            rank.join(timeout=300)
            rank.kill()
        printed = [output.read_text() for output in outputs]
    assert [rank.exitcode for rank in ranks] == [0] * count, "\n".join(printed)[-4000:]
    return "".join(printed)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, tiny_model) -> Path:
    """A small processed dataset, not to be changed: 32 training and 8 validation pairs, at most 64 tokens."""
    directory = tmp_path_factory.mktemp("prepared")
    source = directory / "easy.jsonl"
    source.write_text("".join(json.dumps(pair) + "\n" for pair in make_pairs(40)))
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_main(
            "load_helpsteer_dataset", monkeypatch, "--source", source, "--model", tiny_model,
            "--output", directory / "processed", "--max_length", "64",
        )  # fmt: skip
    return directory / "processed"


@pytest.fixture
def processed(tmp_path, prepared) -> str:
    """A copy of `prepared` for this test alone."""
    return str(shutil.copytree(prepared, tmp_path / "processed"))


@pytest.fixture
def page_flags(tiny_model, tiny_reward_model, prepared, tmp_path) -> dict:
    """Flags of a page on tiny models; votes go to `tmp_path`."""
    return {
        "--reward_model": tiny_reward_model,
        "--sft_model": tiny_model,
        "--data": prepared,
        "--votes": tmp_path / "votes.jsonl",
    }


def given(flags: dict, *more) -> list:
    """Flags and their values as a command line has them."""
    return [*itertools.chain(*flags.items()), *more]


def refuse_system_turns(model: str, directory: Path) -> str:
    """A copy of a model whose chat template refuses them."""
    template = Path(shutil.copytree(model, directory)) / "chat_template.jinja"
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    template.write_text(refusing + template.read_text())
    return str(directory)


@pytest.fixture
def train(monkeypatch, processed, tiny_model, tmp_path):
    """Call the training script on the small dataset; returns the output directory."""

    def arguments(directory, *more) -> list[str]:
        common = ["--model", tiny_model, "--output_dir", directory, "--bf16", "false", "--disable_tqdm", "true"]
        common += ["--mismatched_share", "0"]  # so that there are 4 updates of 8 pairs
        data = [] if "--streaming" in more or "--data" in more else ["--data", processed]
        return [str(each) for each in (*common, *data, *more)]

    def call(*more, output="reward"):
        directory = tmp_path / output
        run_main("train_reward_model", monkeypatch, *arguments(directory, *more))
        return directory

    call.arguments = arguments
    return call
