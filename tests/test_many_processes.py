"""Two processes do what one does: data prepared once, the same losses, every pair evaluated once, one writer."""

import csv
import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import ROOT, in_processes, make_pairs, names_of, parse, run_main, weights
from trl import RewardConfig

from reward_pipeline import cards, prefix_sharing, reward_training
from reward_pipeline.reward_training import share_update
from reward_pipeline.runs import held_output
from reward_pipeline.trl_flags import REWARD_CONFIG, fields_given

TOGETHER = """
import json, os, runpy, sys
from pathlib import Path
from accelerate import PartialState
from reward_pipeline import cards, processed, reward_training
from reward_pipeline.files import InputError
from reward_pipeline.processes import run_script

calls, prepared, refused = map(Path, sys.argv[1:])
write_pairs = processed.write_pairs


def counted(*arguments):
    with prepared.open("a") as file:
        print(os.environ["RANK"], file=file)
    return write_pairs(*arguments)


def main():
    processed.write_pairs = counted
    cards.plot_evaluation, reward_training.plot_curves = (lambda *rest: []), (lambda *rest: None)  # dear
    for script, *arguments in json.loads(calls.read_text()):
        sys.argv = [script, *arguments]
        try:
            runpy.run_path(script)["main"]()  # all in one group of processes, which `run_script` closes at the end
        except InputError as error:
            with refused.open("a") as file:
                print(error, file=file)
        PartialState().wait_for_everyone()


run_script(main)
"""


TRAINING = [
    *("--bf16", "false", "--optim", "sgd", "--learning_rate", "0.5", "--disable_tqdm", "true"),
    *("--logging_steps", "1", "--eval_steps", "2", "--save_steps", "2"),
    # Then 32 pairs and 8 more are 5 whole updates: one that is not whole is divided unevenly.
    *("--mismatched_share", "0.25"),
]


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
        training = [*common, *TRAINING]
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
            (ROOT / "load_helpsteer_dataset.py", *common, *data),
            (ROOT / "train_reward_model.py", *prepared),
            (ROOT / "train_reward_model.py", *prepared),
            (ROOT / "train_reward_model.py", *streamed, "--output_dir", output / "streamed"),
        ]
        return [[*map(str, call)] for call in named]

    (root / "together.py").write_text(TOGETHER)
    two = calls(root / "two")
    refused = [*two[1][:-1], str(root / "two" / "held")]  # into a directory that another run holds
    (root / "calls.json").write_text(json.dumps([*two, refused]))
    with held_output(root / "two" / "held"):
        printed = in_processes(2, root / "together.py", root / "calls.json", root / "prepared", root / "refused")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(cards, "plot_evaluation", lambda *rest: [])
        monkeypatch.setattr(reward_training, "plot_curves", lambda *rest: None)
        for script, *arguments in calls(root / "one"):
            run_main(Path(script).stem, monkeypatch, *arguments)
    return Runs(root / "one", root / "two", printed)


def logged(output: Path, name: str) -> list[float]:
    log = json.loads((output / "training_log.json").read_text())
    return [entry[name] for entry in log if name in entry]


def test_data_is_prepared_once(runs):
    assert (runs.two.parent / "prepared").read_text() == "0\n"
    sizes = json.loads((runs.two / "data" / "metadata.json").read_text())["splits"]
    assert sizes == {"train": 32, "validation": 9}


def test_both_processes_stop_when_one_is_refused(runs):
    refused = (runs.two.parent / "refused").read_text().splitlines()
    assert (
        refused == [f"{runs.two / 'held'}: another run is writing it; wait for its end or choose another directory"] * 2
    )


@pytest.mark.parametrize("output", ["reward", "streamed"])
def test_two_processes_train_as_one(runs, output):
    one, two = runs.one / output, runs.two / output
    losses = logged(one, "loss")
    assert logged(two, "loss") == pytest.approx(losses, abs=2e-4)
    assert max(losses) - min(losses) > 1e-2
    metrics = json.loads((two / "metrics.json").read_text())
    assert (metrics["pairs_per_update"], metrics["updates"]) == (8, len(losses))
    other = weights(two)
    assert weights(one).keys() == other.keys()
    assert all(torch.allclose(tensor, other[name], atol=1e-4) for name, tensor in weights(one).items())


def test_every_pair_is_evaluated_once(runs):
    """9 pairs: an uneven last batch in training, unequal shares in the last evaluation."""
    tables = []
    for output in (runs.one / "reward", runs.two / "reward"):
        with (output / "rewards.csv").open() as file:
            tables.append([{**row, "place": row["place"].partition(", ")[2]} for row in csv.DictReader(file)])
    assert [row["place"] for row in tables[1]] == [f"validation row {number}" for number in range(1, 10)]
    for one, two in zip(*tables, strict=True):
        for name in ("chosen_reward", "shuffled_chosen_reward", "other_reward"):  # the partners of all pairs as well
            assert float(two[name]) == pytest.approx(float(one[name]), rel=2e-2, abs=2e-2)
    assert logged(runs.two / "reward", "eval_accuracy") == logged(runs.one / "reward", "eval_accuracy")
    assert {round(9 * accuracy, 3) % 0.5 for accuracy in logged(runs.two / "reward", "eval_accuracy")} == {0}


def test_one_process_writes_and_decides(runs):
    assert runs.printed.count("written to") == 3
    assert runs.printed.count("holds the result of this run") == 1  # the second training finds the first one finished
    assert not list(runs.two.rglob(".*"))
    files = [{str(path.relative_to(each)) for path in each.rglob("*")} for each in (runs.one, runs.two)]
    assert {name for name in files[0] ^ files[1] if "rng_state" not in name} == set()


def divide_weights() -> None:
    """Let `accelerate` divide the weights among processes without a GPU, for which it would choose DDP."""
    PartialState._prepare_backend = lambda self, *others: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    prefix_sharing.share_prefixes = lambda model: False  # as on a GPU
    cards.plot_evaluation, reward_training.plot_curves = (lambda *rest: []), (lambda *rest: None)
    torch.distributed.init_process_group("gloo")


def train_sharded(tiny_model: str, data: Path, output: Path, *arguments: str) -> None:
    """Train with the settings of `runs` in two processes that divide the weights, by the configuration for users."""
    launch = ["--num_processes", "2", "--config_file", ROOT / "accelerate_configs" / "fsdp2.yaml", "script.py"]
    options, _, _ = _validate_launch_command(launch_command_parser().parse_args(list(map(str, launch))))
    environment = {
        name: value for name, value in prepare_multi_gpu_env(options).items() if "ACCELERATE" in name or "FSDP" in name
    }
    training = ["--model", tiny_model, "--data", data, "--output_dir", output, *TRAINING, *arguments]
    script = ROOT / "train_reward_model.py"
    in_processes(
        2, script, *training, before=divide_weights, environment={"ACCELERATE_USE_CPU": "false", **environment}
    )


def test_fsdp_trains_as_one_process_and_resumes(runs, tiny_model, tmp_path, monkeypatch):
    adam = ["--optim", "adamw_torch_fused", "--learning_rate", "1e-3"]  # what SGD leaves, `torch` can not load again
    sharded, one = tmp_path / "sharded", tmp_path / "one"
    train_sharded(tiny_model, runs.one / "data", sharded, *adam)
    common = ["--model", tiny_model, "--data", runs.one / "data", *TRAINING, *adam]
    run_main("train_reward_model", monkeypatch, *common, "--output_dir", one)
    losses = logged(one, "loss")
    assert logged(sharded, "loss") == pytest.approx(losses, abs=2e-4) and max(losses) - min(losses) > 1e-2
    assert logged(sharded, "eval_accuracy") == logged(one, "eval_accuracy")
    whole = weights(sharded)
    assert all(torch.allclose(tensor, whole[name], atol=1e-4) for name, tensor in weights(one).items())
    shutil.rmtree(sharded / "checkpoints" / "checkpoint-5")
    (sharded / "config.json").unlink()  # as if killed before the result was there
    train_sharded(tiny_model, runs.one / "data", sharded, *adam)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(sharded).items())


def test_fsdp_in_bf16_keeps_rewards_in_fp32(runs, tiny_model, tmp_path):
    train_sharded(tiny_model, runs.one / "data", tmp_path / "sharded", "--bf16", "true")
    losses = logged(tmp_path / "sharded", "loss")
    assert losses == pytest.approx(logged(runs.one / "reward", "loss"), abs=5e-2)
    rounded = torch.tensor(losses).bfloat16().tolist()
    assert losses != pytest.approx(rounded, abs=2e-4)  # the log has four digits


def test_an_update_can_be_divided_as_the_configurations_say(monkeypatch):
    for path in (ROOT / "accelerate_configs").glob("*.yaml"):
        text = path.read_text()
        flags = re.findall(r"(--per_device_train_batch_size|--gradient_accumulation_steps) (\d+)", text)
        options = vars(parse("train_reward_model", *(part for flag in flags for part in flag)))
        config = RewardConfig(**fields_given(REWARD_CONFIG, options), use_cpu=True, bf16=False)
        processes = yaml.safe_load(text)["num_processes"]
        monkeypatch.setattr(type(config), "world_size", processes)
        constants = names_of("train_reward_model")
        share_update(config, constants["PER_DEVICE_TRAIN_BATCH_SIZE"], constants["GRADIENT_ACCUMULATION_STEPS"])
        assert processes * config.per_device_train_batch_size * config.gradient_accumulation_steps >= 8


@pytest.mark.parametrize("name, kind", [
    ("multi_gpu", "MULTI_GPU"), ("multi_node", "MULTI_GPU"), ("fsdp2", "FSDP"), ("deepspeed_zero3", "DEEPSPEED"),
])  # fmt: skip
def test_configurations_are_understood_by_accelerate(name, kind):
    path = ROOT / "accelerate_configs" / f"{name}.yaml"
    options, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(path), "x.py"]))
    assert (options.multi_gpu, options.use_fsdp, options.use_deepspeed) == tuple(
        kind == each for each in ("MULTI_GPU", "FSDP", "DEEPSPEED")
    )
    assert options.num_processes == 8 * options.num_machines
    assert options.mixed_precision == "no"  # otherwise `--bf16 false` would be overruled
    assert options.gradient_accumulation_steps is None and options.gradient_clipping is None  # those of the script
    assert kind != "FSDP" or (options.fsdp_version, options.fsdp_state_dict_type) == (2, "FULL_STATE_DICT")
    assert kind != "DEEPSPEED" or (options.zero_stage, options.zero3_save_16bit_model) == (3, True)
