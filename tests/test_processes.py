"""What one process can show; `test_many_processes.py` has the rest."""

import signal

import pytest
import torch
from safetensors.torch import save_file

from reward_pipeline import processes
from reward_pipeline.files import InputError
from reward_pipeline.processes import is_first_process, run_script, stop_requests, together


def test_user_errors_are_one_line_with_exit_code_1():
    def main():
        raise InputError("pairs.jsonl row 3: what is wrong; what to do")

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == "error: pairs.jsonl row 3: what is wrong; what to do"  # a text means exit code 1


@pytest.mark.parametrize("save", [torch.save, save_file], ids=["torch", "safetensors"])
def test_a_full_disk_is_one_line_with_exit_code_1(small_disk, save):
    path = small_disk("size=1m") / "weights"
    with pytest.raises(SystemExit, match=r"^error: the disk is full .*; make room and repeat the command$") as ended:
        run_script(lambda: save({"weight": torch.zeros(10**6)}, path))
    assert "\n" not in ended.value.code


def raising(error: BaseException):
    def main():
        raise error

    return main


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        run_script(raising(RuntimeError("a bug")))


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (SystemExit(3), 3)])
def test_exit_codes(error, code):
    with pytest.raises(SystemExit) as ended:
        run_script(raising(error))
    assert ended.value.code == code


def test_a_script_that_ends_well_ends_quietly():
    calls = []
    run_script(lambda: calls.append(1))
    assert calls == [1]


@pytest.mark.parametrize("name, rank, first", [("RANK", "0", True), ("RANK", "1", False), ("PMI_RANK", "2", False)])
def test_the_first_process_is_known_by_the_environment(monkeypatch, name, rank, first):
    monkeypatch.delenv("RANK", raising=False)
    assert is_first_process()
    monkeypatch.setenv(name, rank)
    assert is_first_process() is first


@pytest.mark.parametrize("first_alone", [False, True])
def test_one_process_is_together_with_itself(first_alone):
    assert together(lambda: {"a": 1}, first_alone) == {"a": 1}
    with pytest.raises(InputError, match="what is wrong"):
        together(raising(InputError("what is wrong")), first_alone)
    with pytest.raises(RuntimeError, match="a bug"):
        together(raising(RuntimeError("a bug")), first_alone)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_is_a_request_and_a_second_one_stops(number, monkeypatch, capsys):
    clock = iter([10.0, 10.5, 11.5])
    monkeypatch.setattr(processes.time, "monotonic", lambda: next(clock))
    before = signal.getsignal(number)
    with stop_requests() as requested:
        assert not requested()
        signal.raise_signal(number)
        assert requested()
        signal.raise_signal(number)  # handed on by a launcher, which got it at the same moment
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before
    assert "Stopping after this update" in capsys.readouterr().err


def test_alone_what_is_decided_once_connects_nothing(monkeypatch):
    monkeypatch.setattr(processes, "together", None)
    assert processes.decided_once(lambda: "mine") == "mine"
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = []
    monkeypatch.setattr(processes, "together", lambda act, first_alone: asked.append(first_alone) or "the first one's")
    assert processes.decided_once(lambda: "mine") == "the first one's" and asked == [True]
