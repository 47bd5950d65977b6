"""Time and memory of the preparation against the number of pairs.

In:  nothing; the pairs are made up, every text is another one.
Out: a table on the terminal, with `--plot` a picture, and with `--json` a file with all figures.

    python benchmarks/dataset_scaling.py
    python benchmarks/dataset_scaling.py --sizes 1000 10000 100000 1000000 --json dataset_scaling.json

A million pairs take a quarter of an hour on two cores and 12 GB of temporary files; the default ends in some minutes.
"""

import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from matplotlib.figure import Figure
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure
from reward_pipeline.files import InputError
from reward_pipeline.processes import run_script
from reward_pipeline.settings import Parser, filled_text, whole

VOCABULARY = 20_000  # made-up words
WORDS = {"prompt": 20, "chosen": 60, "rejected": 60}  # of a text; its length varies by a factor of 2 around that
POLL_SECONDS = 0.05  # between two looks at the memory


def words(generator: np.random.Generator) -> np.ndarray:
    """Words of 2 to 10 letters."""
    letters = np.array(list("aeioulnrstdmbcp"))
    return np.array(["".join(generator.choice(letters, generator.integers(2, 11))) for _ in range(VOCABULARY)])


def write_pairs(path: Path, count: int) -> None:
    generator = np.random.default_rng(count)
    vocabulary = words(generator)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            pair = {}
            for name, mean in WORDS.items():
                size = generator.integers(mean * 2 // 3, mean * 4 // 3)
                pair[name] = " ".join(vocabulary[generator.integers(VOCABULARY, size=size)])
            file.write(json.dumps(pair) + "\n")


def own_memory(process: psutil.Process) -> int:
    """Bytes that only this process can have: without the pages of mapped files, which the kernel may drop (Linux)."""
    info = process.memory_info()
    return info.rss - getattr(info, "shared", 0)


def measure_preparation(source: Path, output: Path) -> dict[str, float]:
    """Seconds of `load_helpsteer_dataset.py`, and bytes: peak memory, its own and with mapped files; what it wrote.

    Raises:
        InputError: it failed.
    """
    command = [sys.executable, measure.ROOT / "load_helpsteer_dataset.py", "--source", source, "--output", output]
    started, own, resident = time.perf_counter(), 0, 0
    with (output.parent / "log").open("w") as log:
        process = psutil.Popen(command, stdout=log, stderr=log)
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                own, resident = max(own, own_memory(process)), max(resident, process.memory_info().rss)
            time.sleep(POLL_SECONDS)
    if process.returncode:
        raise InputError(f"load_helpsteer_dataset.py failed: {(output.parent / 'log').read_text()[-500:].strip()}")
    return {
        "seconds": time.perf_counter() - started,
        "peak_memory": own,
        "peak_with_files": resident,
        "written": sum(file.stat().st_size for file in output.rglob("*") if file.is_file()),
    }


def exponent(sizes: list[int], seconds: list[float]) -> float | None:
    """Slope of log(seconds beyond those of the smallest size) over log(size): 1 is linear.

    None where a larger size took no longer than the smallest.
    """
    extra = np.array(seconds[1:]) - seconds[0]
    if extra.min() <= 0:
        return None
    return float(np.polyfit(np.log(sizes[1:]), np.log(extra), 1)[0])


def plot(rows: list[dict[str, float]], path: str) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    sizes = [row["pairs"] for row in rows]
    time_axes.loglog(sizes, [row["seconds"] for row in rows], marker="o")
    time_axes.set(xlabel="pairs", ylabel="seconds")
    memory_axes.semilogx(sizes, [row["peak_memory"] / 2**20 for row in rows], marker="o")
    memory_axes.set(xlabel="pairs", ylabel="peak memory (MiB)", ylim=(0, None))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = Parser(__doc__)
    parser.flag("sizes", [1_000, 10_000, 100_000], whole(2), "pairs, ascending", nargs="+")
    parser.flag("plot", None, filled_text, "PNG file", metavar="FILE")
    parser.flag("json", None, filled_text, "file for the figures", metavar="FILE")
    options = parser.parse_args()
    if options.sizes != sorted(set(options.sizes)):
        parser.error("--sizes: must ascend")
    rows = []
    for count in tqdm(options.sizes, desc="Sizes"):
        with tempfile.TemporaryDirectory() as directory:
            source = Path(directory) / "pairs.jsonl"
            write_pairs(source, count)
            rows.append({"pairs": count, **measure_preparation(source, Path(directory) / "processed")})
    table = [
        [f"{row['pairs']:,}", f"{row['seconds']:.1f}", f"{row['pairs'] / row['seconds']:,.0f}",
         f"{row['peak_memory'] / 2**20:,.0f} MiB", f"{row['peak_with_files'] / 2**20:,.0f} MiB",
         f"{row['written'] / 2**20:,.0f} MiB"]
        for row in rows
    ]  # fmt: skip
    machine = measure.machine()
    print(measure.describe_machine(machine))
    measure.print_table(["pairs", "seconds", "pairs/s", "peak memory", "with mapped files", "written"], table)
    if len(rows) > 2:
        slope = exponent([row["pairs"] for row in rows], [row["seconds"] for row in rows])
        power = "–" if slope is None else f"{slope:.2f}"
        print(f"time grows as size to the power of {power} beyond the smallest size")
    if options.plot:
        plot(rows, options.plot)
    measure.write_figures(options.json, {"machine": machine, "sizes": rows})


if __name__ == "__main__":
    run_script(main)
