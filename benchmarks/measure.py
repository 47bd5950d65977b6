"""What the benchmarks have in common: contenders that take turns, the rate that the machine can reach, the scripts.

Every contender is a process of its own, so that none of them works with the memory, the allocator settings or the
caches of another one, and its peak memory is its own. Only one computes at a time; they take turns, so that a change
of the machine's pace meets all of them.
"""

import contextlib
import functools
import io
import json
import math
import multiprocessing
import resource
import runpy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from tabulate import tabulate
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reward_pipeline.devices import autocast_dtype, pick_device
from reward_pipeline.files import InputError, write_text
from reward_pipeline.settings import Parser, filled_text, whole

ROOT = Path(__file__).resolve().parents[1]  # where the scripts are
WARM_UP = 1  # turns that are not counted
TIME_LIMIT = 480  # seconds; the round that is under way then is the last one
RATE_SHAPE = (2048, 576, 1536)  # of the matrix product: tokens, hidden and intermediate size of SmolLM2-135M
RATE_REPEATS = 30
FORWARD, TRAINING = 2, 6  # operations a token and parameter without embeddings (arXiv 2001.08361)
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# What decides the optimisation, under TRL's names: whoever is compared with `train_reward_model.py` gets the same.
OPTIMISATION = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "weight_decay", "max_grad_norm"),
)

Turn = dict[str, Any]


class Over(Exception):
    """No more turns are asked for: leaves a script wherever its work stands."""


# --- the scripts of this project -------------------------------------------------------------------------------------


@functools.cache
def script(name: str) -> dict[str, Any]:
    """Constants and functions of a script; nothing imports one."""
    return runpy.run_path(str(ROOT / f"{name}.py"), run_name=name)


def run(name: str, *arguments: object) -> None:
    """Run a script in this process with these flags; its errors come through.

    It looks up what it calls in the rooms of the package, so what is replaced there is what it uses.
    """
    sys.argv = [f"{name}.py", *map(str, arguments)]
    script(name)["main"]()


def parser(docstring: str, rounds: int, most: float = math.inf) -> Parser:
    """Parser with the flags of all benchmarks in which contenders take turns.

    Args:
        rounds: turns of each that are counted, by default; `most` are possible.
    """
    made = Parser(docstring)
    made.flag("rounds", rounds, whole(1, most), "turns of each that are counted")
    made.flag("json", None, filled_text, "file for the figures", metavar="FILE")
    return made


# --- contenders ------------------------------------------------------------------------------------------------------


def turns(pipe: Connection) -> Iterator[Turn]:
    """In a contender: begin a turn whenever it is asked for; what is put into the dictionary is reported with the time.

    A turn lasts until the next one is asked of this iterator.
    """
    device = pick_device()
    while pipe.recv():
        figures: Turn = {}
        started = time.perf_counter()
        yield figures
        if device.type == "cuda":
            torch.cuda.synchronize()
        pipe.send({"seconds": time.perf_counter() - started, "peak_memory": peak_memory(device), **figures})


def next_turn(turns: Iterator[Turn]) -> Turn:
    """End the turn and begin the next one, from within something that is not written as a loop over `turns`.

    Raises:
        Over: there is none.
    """
    figures = next(turns, None)
    if figures is None:
        raise Over
    return figures


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU where there is one, otherwise of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def contend(work: Callable, pipe: Connection, arguments: tuple) -> None:
    """Body of a contender's process."""
    # Its own lines and bars would be between those of the others; a traceback is printed outside of this.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            work(turns(pipe), *arguments)
        except Over:
            pass
        except InputError as error:
            pipe.send(error)


def take_turns(
    contenders: dict[str, tuple[Callable, tuple]], rounds: int, limit: float = TIME_LIMIT
) -> dict[str, list[Turn]]:
    """Let every contender take `rounds` turns, one after another; fewer rounds where the time does not suffice.

    Args:
        contenders: by name a function, which gets an iterator of `turns` and further arguments, and these.

    Returns:
        By name the figures of its turns, each with `seconds` and `peak_memory` (bytes).

    Raises:
        InputError: a contender can not work, or died.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes, results = {}, [], {name: [] for name in contenders}
    try:
        for name, (work, arguments) in contenders.items():
            pipes[name], theirs = context.Pipe()
            processes.append(context.Process(target=contend, args=(work, theirs, arguments), daemon=True))
            processes[-1].start()
            theirs.close()
        ends = time.monotonic() + limit
        bar = tqdm(range(WARM_UP + rounds), desc="Rounds", unit=" rounds")
        for number in bar:
            for name, pipe in pipes.items():
                bar.set_postfix_str(name)
                figures = ask(name, pipe)
                if number >= WARM_UP:
                    results[name].append(figures)
            if time.monotonic() > ends and number >= WARM_UP:
                break
        for pipe in pipes.values():
            pipe.send(False)
    finally:
        for process in processes:
            process.join(timeout=10)
            process.terminate()
    return results


def ask(name: str, pipe: Connection) -> Turn:
    """One turn of a contender."""
    try:
        pipe.send(True)
        figures = pipe.recv()
    except (EOFError, OSError) as error:
        raise InputError(f"{name} ended before its time; its message is above") from error
    if isinstance(figures, InputError):
        raise figures
    return figures


# --- figures of turns ------------------------------------------------------------------------------------------------


def median(values: list[Turn], name: str) -> float:
    return statistics.median(turn[name] for turn in values)


def rate(counts: list[float], seconds: list[float]) -> float:
    """Median of so many a second."""
    return statistics.median(count / spent for count, spent in zip(counts, seconds, strict=True))


def faster_by(ours: list[Turn], theirs: list[Turn]) -> float:
    """How many times as much the one does in a second: the median over rounds, which both went through side by side.

    Work is `tokens` where a turn counts them; without, every turn did the same.
    """
    speeds = ([turn.get("tokens", 1) / turn["seconds"] for turn in turns] for turns in (ours, theirs))
    return statistics.median(own / other for own, other in zip(*speeds, strict=True))


def most_memory(values: list[Turn]) -> int:
    """Bytes."""
    return max(turn["peak_memory"] for turn in values)


def body_parameters(model) -> int:
    """Parameters without the embeddings."""
    return sum(each.numel() for each in model.parameters()) - model.get_input_embeddings().weight.numel()


# --- the machine -----------------------------------------------------------------------------------------------------


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of matrix products as large as those of SmolLM2-135M; the fastest quarter's slowest."""
    tokens, inner, outer = RATE_SHAPE
    a, b = (torch.randn(shape, device=device, dtype=dtype) for shape in ((tokens, inner), (inner, outer)))
    seconds = []
    for _ in range(RATE_REPEATS):
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * tokens * inner * outer / sorted(seconds)[RATE_REPEATS // 4]


def own_dtype() -> torch.dtype:
    """What this project computes in here wherever it does not compute in fp32 on purpose."""
    return autocast_dtype(pick_device()) or torch.float32


def rate_in(dtype: torch.dtype, machine: dict[str, Any]) -> float:
    """Operations per second of the matrix products of `machine` in this type."""
    return machine[f"{DTYPES[dtype]}_rate"]


def machine() -> dict[str, Any]:
    """What the figures depend on: device, cores, threads, memory, and the rates of matrix products."""
    device = pick_device()
    dtypes = {torch.float32, own_dtype()}  # emulated bf16 is used by nobody, and takes minutes to measure
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": psutil.virtual_memory().total,
        "torch": torch.__version__,
        **{f"{name}_rate": matrix_rate(dtype, device) for dtype, name in DTYPES.items() if dtype in dtypes},
    }


def describe_machine(figures: dict[str, Any]) -> str:
    measured = {name: figures.get(f"{name}_rate") for name in DTYPES.values()}
    rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in measured.items() if rate)
    return f"{figures['device']}, {figures['threads']} threads, torch {figures['torch']}; matrix products: {rates}"


# --- what is printed and written -------------------------------------------------------------------------------------


def gibibytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def print_table(header: list[str], rows: list[list[str]]) -> None:
    alignment = ["left"] + ["right"] * (len(header) - 1)
    print(tabulate(rows, header, tablefmt="github", disable_numparse=True, colalign=alignment))


def write_figures(path: str | None, figures: dict[str, Any]) -> None:
    if path:
        write_text(path, json.dumps(figures, indent=2) + "\n")
