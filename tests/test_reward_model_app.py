"""Flags of the page, and what it says before there is a page. The page itself: `test_page.py`."""

import importlib.util
import json
import shutil
import socket
import weakref

import gradio as gr
import pytest
from conftest import given, names_of, parse, run_main

from reward_pipeline.page import Arena, counted
from reward_pipeline.page_texts import translator
from reward_pipeline.votes import Duel, append_vote, vote_row


def ends_with(script_arguments, monkeypatch, capsys) -> str:
    """The one line with which the script ends."""
    with pytest.raises(SystemExit) as end:
        run_main("reward_model_app", monkeypatch, *script_arguments)
    assert end.value.code not in (0, None)
    line = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err.strip()
    assert line.startswith("error: ") and "\n" not in line
    return line


@pytest.fixture
def launched(monkeypatch):
    """What the script would serve."""
    calls = []
    monkeypatch.setattr(gr.Blocks, "launch", lambda page, **options: calls.append(options))
    monkeypatch.setattr(gr.Blocks, "block_thread", lambda page: None)
    return calls


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--reward_model", "none", "x"], "none stands alone"),
        (["--port", "0"], "must be a whole number"),
        (["--arena", "one"], "expected 2 arguments"),
        (["--temperatures", "0", "1"], "must be"),
        (["--max_new_tokens", "0"], "must be a whole number"),
    ],
)
def test_wrong_flags_are_told(arguments, words, monkeypatch, capsys):
    assert words in ends_with(arguments, monkeypatch, capsys)


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else find(name, *rest)
    )
    assert "pip install -r requirements-app.txt" in ends_with([], monkeypatch, capsys)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"--reward_model": "nowhere"}, "nowhere"),
        ({"--data": "nowhere"}, "run load_helpsteer_dataset.py first"),
        ({"--policy": "nowhere"}, "run train_reinforce.py first"),
        ({"--votes": "."}, "name another file of votes"),
    ],
)
def test_what_is_not_there_is_told(change, words, page_flags, monkeypatch, capsys, launched):
    assert words in ends_with(given(page_flags | change), monkeypatch, capsys)
    assert not launched


def test_a_taken_port_is_told(page_flags, monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port {port}" in ends_with(given(page_flags, "--port", port), monkeypatch, capsys)


def test_it_is_for_this_machine_alone(page_flags, monkeypatch, capsys, launched):
    run_main("reward_model_app", monkeypatch, *given(page_flags))
    (options,) = launched
    assert (options["server_name"], options["share"]) == ("127.0.0.1", False)
    assert "(temperature 1) and " in capsys.readouterr().out  # no policy: the SFT model on both sides


def test_a_policy_fights_the_sft_model(page_flags, tiny_model, tmp_path, monkeypatch, capsys, launched):
    policy = shutil.copytree(tiny_model, tmp_path / "policy")
    run_main("reward_model_app", monkeypatch, *given(page_flags, "--policy", policy))
    assert f"In the arena: {tiny_model} and {policy}; 8 prompts." in capsys.readouterr().out


def test_files_of_answers_bring_their_prompts(page_flags, write_jsonl, monkeypatch, capsys, launched):
    rows = [{"prompt": f"Name river {number}.", "response": "Volga"} for number in range(3)]
    files = [write_jsonl(rows, "a.jsonl"), write_jsonl(rows[1:], "b.jsonl")]
    page_flags["--reward_model"] = "none"
    run_main("reward_model_app", monkeypatch, *given(page_flags, "--arena", *files))
    assert f"In the arena: {files[0]} and {files[1]}; 2 prompts." in capsys.readouterr().out


def test_a_result_that_can_not_be_written_hides_no_vote(tmp_path):
    duel = Duel([{"role": "user", "content": "Hi"}], "Hello!", "No.", "m", "n")
    append_vote(tmp_path / "votes.jsonl", vote_row(duel, "left", "Ada"))
    lock = tmp_path / ".votes.jsonl.lock"
    lock.unlink(missing_ok=True)
    lock.mkdir()
    arena = Arena([], [], tmp_path / "votes.jsonl", None, None)
    table, note = counted(arena, weakref.WeakKeyDictionary(), None, translator("en"))
    assert table["voter"].tolist() == ["Ada"] and ".lock" in note
    assert not (tmp_path / "votes.results.json").exists()


def test_settings_come_from_a_file_too(tmp_path):
    config = tmp_path / "page.yaml"
    config.write_text(json.dumps({"port": 7000, "reward_model": ["a", "b"]}))
    options = parse("reward_model_app", "--config", config)
    assert (options.port, options.reward_model, options.host) == (
        7000,
        ["a", "b"],
        names_of("reward_model_app")["HOST"],
    )
