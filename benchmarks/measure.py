"""What the speed benchmarks have in common: contenders that take turns, and the rate that the machine can reach.

Every contender is a process of its own, so that none of them works with the memory, the allocator settings or the
caches of another one, and its peak memory is its own. Only one computes at a time; they take turns, so that a change
of the machine's pace meets all of them.
"""

import argparse
import json
import multiprocessing
import resource
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

from load_smollm_model import InputError, autocast_dtype, pick_device, write_text

WARM_UP = 1  # turns that are not counted
TIME_LIMIT = 480  # seconds; the round that is under way then is the last one
RATE_SHAPE = (2048, 576, 1536)  # of the matrix product: tokens, hidden and intermediate size of SmolLM2-135M
RATE_REPEATS = 30
FORWARD, TRAINING = 2, 6  # operations a token and parameter without embeddings (arXiv 2001.08361)
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

Turn = dict[str, Any]


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


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU where there is one, otherwise of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def contend(work: Callable, pipe: Connection, arguments: tuple) -> None:
    """Body of a contender's process."""
    try:
        work(turns(pipe), *arguments)
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


def median(values: list[Turn], name: str) -> float:
    return statistics.median(turn[name] for turn in values)


def rate(counts: list[float], seconds: list[float]) -> float:
    """Median of so many a second."""
    return statistics.median(count / spent for count, spent in zip(counts, seconds, strict=True))


def ratios(ours: list[Turn], theirs: list[Turn]) -> list[float]:
    """Seconds of the one divided by those of the other, round by round."""
    return [other["seconds"] / own["seconds"] for own, other in zip(ours, theirs, strict=True)]


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
    dtypes = {torch.bfloat16, torch.float32, own_dtype()}
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


def above_zero(text: str) -> int:
    """Type of a flag."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be above 0")
    return number


def body_parameters(model) -> int:
    """Parameters without the embeddings."""
    return sum(each.numel() for each in model.parameters()) - model.get_input_embeddings().weight.numel()


def print_table(header: list[str], rows: list[list[str]]) -> None:
    alignment = ["left"] + ["right"] * (len(header) - 1)
    print(tabulate(rows, header, tablefmt="github", disable_numparse=True, colalign=alignment))


def write_figures(path: Path | None, figures: dict[str, Any]) -> None:
    if path:
        write_text(path, json.dumps(figures, indent=2) + "\n")
