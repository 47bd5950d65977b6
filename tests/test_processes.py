"""Two processes do what one does: data prepared once, the same losses, every pair evaluated once, one writer."""

import csv
import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import make_pairs, run_main, torchrun
from safetensors.torch import load_file

import load_helpsteer_dataset
import train_reward_model

TOGETHER = """
import importlib, json, os, sys
from pathlib import Path
from accelerate import PartialState
import load_helpsteer_dataset
from load_smollm_model import run_script

calls, prepared = map(Path, sys.argv[1:])
prepare = load_helpsteer_dataset.prepare


def counted(*arguments):
    with prepared.open("a") as file:
        print(os.environ["RANK"], file=file)
    return prepare(*arguments)


def main():
    load_helpsteer_dataset.prepare = counted
    for script, *arguments in json.loads(calls.read_text()):
        sys.argv = [script, *arguments]
        importlib.import_module(script).main()
        PartialState().wait_for_everyone()


run_script(main)
"""


class Runs(NamedTuple):
    """What one process and two have left, and what the two printed."""

    one: Path
    two: Path
    printed: str


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model) -> Runs:
    """41 pairs are prepared, trained on, trained on once more, and streamed, all by two processes and by one."""
    root = tmp_path_factory.mktemp("processes")
    source = root / "pairs.jsonl"
    source.write_text("".join(json.dumps(pair) + "\n" for pair in make_pairs(41)))

    def calls(output: Path) -> list[list[str]]:
        common = ["--model", tiny_model]
        data = ["--source", source, "--output", output / "data", "--max_length", "64"]
        training = [*common, "--bf16", "false", "--optim", "sgd", "--learning_rate", "0.5", "--disable_tqdm", "true"]
        training += ["--logging_steps", "1", "--eval_steps", "2", "--save_steps", "2"]
        prepared = [*training, "--data", output / "data", "--output_dir", output / "reward"]
        streamed = [
            *training,
            "--streaming",
            source,
            "--max_length",
            "64",
            "--max_steps",
            "3",
            "--max_eval_samples",
            "3",
        ]
        named = [
            ("load_helpsteer_dataset", *common, *data),
            ("train_reward_model", *prepared),
            ("train_reward_model", *prepared),
            ("train_reward_model", *streamed, "--output_dir", output / "streamed"),
        ]
        return [[*map(str, call)] for call in named]

    (root / "together.py").write_text(TOGETHER)
    (root / "calls.json").write_text(json.dumps(calls(root / "two")))
    done = torchrun(2, root / "together.py", root / "calls.json", root / "prepared")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for script, *arguments in calls(root / "one"):
            module = {each.__name__: each for each in (load_helpsteer_dataset, train_reward_model)}[script]
            run_main(module, monkeypatch, *arguments)
    return Runs(root / "one", root / "two", done.stdout)


def logged(output: Path, name: str) -> list[float]:
    log = json.loads((output / "training_log.json").read_text())
    return [entry[name] for entry in log if name in entry]


def test_data_is_prepared_once(runs):
    assert (runs.two.parent / "prepared").read_text() == "0\n"
    sizes = json.loads((runs.two / "data" / "metadata.json").read_text())["splits"]
    assert sizes == {"train": 32, "validation": 9}


@pytest.mark.parametrize("output", ["reward", "streamed"])
def test_two_processes_train_as_one(runs, output):
    one, two = runs.one / output, runs.two / output
    losses = logged(one, "loss")
    assert logged(two, "loss") == pytest.approx(losses, abs=2e-4)
    assert max(losses) - min(losses) > 1e-2
    metrics = json.loads((two / "metrics.json").read_text())
    assert (metrics["pairs_per_update"], metrics["updates"]) == (8, len(losses))
    weights = [load_file(each / "model.safetensors") for each in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.allclose(tensor, weights[1][name], atol=1e-4) for name, tensor in weights[0].items())


def test_every_pair_is_evaluated_once(runs):
    """9 pairs: an uneven last batch in training, unequal shares in the last evaluation."""
    tables = []
    for output in (runs.one / "reward", runs.two / "reward"):
        with (output / "rewards.csv").open() as file:
            tables.append([{**row, "place": row["place"].partition(", ")[2]} for row in csv.DictReader(file)])
    assert [row["place"] for row in tables[1]] == [f"validation row {number}" for number in range(1, 10)]
    for one, two in zip(*tables, strict=True):
        assert float(two["chosen_reward"]) == pytest.approx(float(one["chosen_reward"]), rel=2e-2, abs=2e-2)
    assert logged(runs.two / "reward", "eval_pair_accuracy") == logged(runs.one / "reward", "eval_pair_accuracy")
    assert {round(9 * accuracy, 3) % 0.5 for accuracy in logged(runs.two / "reward", "eval_pair_accuracy")} == {0}


def test_one_process_writes_and_decides(runs):
    assert runs.printed.count("written to") == 4
    assert runs.printed.count("Resuming from") == 1  # the second training finds the first one finished
    assert not list(runs.two.rglob(".*"))
    files = [{str(path.relative_to(each)) for path in each.rglob("*")} for each in (runs.one, runs.two)]
    assert {name for name in files[0] ^ files[1] if "rng_state" not in name} == set()


@pytest.mark.parametrize("name, kind", [
    ("multi_gpu", "MULTI_GPU"), ("multi_node", "MULTI_GPU"), ("fsdp2", "FSDP"), ("deepspeed_zero3", "DEEPSPEED"),
])  # fmt: skip
def test_configurations_are_understood_by_accelerate(name, kind):
    path = Path(train_reward_model.__file__).parent / "accelerate_configs" / f"{name}.yaml"
    options, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(path), "x.py"]))
    assert (options.multi_gpu, options.use_fsdp, options.use_deepspeed) == tuple(
        kind == each for each in ("MULTI_GPU", "FSDP", "DEEPSPEED")
    )
    assert options.num_processes == 8 * options.num_machines
    assert options.mixed_precision == "no"  # otherwise `--bf16 false` would be overruled
    assert options.gradient_accumulation_steps is None and options.gradient_clipping is None  # those of the script
    assert kind != "FSDP" or (options.fsdp_version, options.fsdp_state_dict_type) == (2, "FULL_STATE_DICT")
    assert kind != "DEEPSPEED" or (options.zero_stage, options.zero3_save_16bit_model) == (3, True)
