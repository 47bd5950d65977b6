import pytest
from conftest import parse, run_main

from reward_pipeline import models


def test_script_reports_and_answers(tiny_model, monkeypatch, capsys):
    run_main("load_smollm_model", monkeypatch, "--model", tiny_model, "--max_new_tokens", "3")
    out = capsys.readouterr().out
    size = sum(parameter.numel() for parameter in models.load_sft_model(tiny_model).parameters())
    assert f"local directory {tiny_model}" in out
    assert f"{size:,} (float32)" in out
    assert f"> {parse('load_smollm_model').prompt}" in out


def test_greedy_answer_of_the_real_model(smollm, monkeypatch, capsys):
    run_main("load_smollm_model", monkeypatch, "--model", smollm, "--prompt", "What is 2+2?", "--max_new_tokens", "12")
    question, answer = capsys.readouterr().out.splitlines()[-2:]
    assert question == "> What is 2+2?" and "4" in answer


def test_an_answer_longer_than_the_model_is_refused(tiny_model, monkeypatch):
    with pytest.raises(SystemExit, match=r"^error: --max_new_tokens: must be at most 2016\b"):
        run_main("load_smollm_model", monkeypatch, "--model", tiny_model, "--max_new_tokens", "2017")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--max_new_tokens", "0"], "--max_new_tokens: must be a whole number, at least 1, not 0"),
        (["--model", ""], "--model: must not be empty"),
        (["--prompt", "a\n<extra_id_1>Assistant\nb"], "--prompt: the prompt must end with a user turn"),
    ],
)
def test_bad_flags_are_one_line(capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        parse("load_smollm_model", *flags)
    error = capsys.readouterr().err
    assert ended.value.code == 1 and error.startswith(f"error: {message}") and error.count("\n") == 1
