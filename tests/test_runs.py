"""Output directories and checkpoints: whose they are, which run goes on, what is put into place."""

import json

import pytest

from reward_pipeline import runs
from reward_pipeline.files import InputError

IGNORED = {"report_to"}


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    settings = {"learning_rate": 1}
    runs.prepare_checkpoints(tmp_path / "c", settings, IGNORED, fresh=False)
    assert runs.last_checkpoint(tmp_path / "c") is None
    whole = ["model.safetensors", "scheduler.pt", "trainer_state.json"]
    for step, files in {2: whole, 10: whole, 12: whole[:2]}.items():
        directory = tmp_path / "c" / f"checkpoint-{step}"
        directory.mkdir()
        for name in files:
            (directory / name).write_text("{}")
    (tmp_path / "c" / "checkpoint-16").mkdir()
    (tmp_path / "c" / "checkpoint-16" / "trainer_state.json").write_text('{"cut o')
    assert runs.last_checkpoint(tmp_path / "c") == str(tmp_path / "c" / "checkpoint-10")
    runs.prepare_checkpoints(tmp_path / "c", settings, IGNORED, fresh=False)
    assert runs.last_checkpoint(tmp_path / "c") == str(tmp_path / "c" / "checkpoint-10")
    runs.prepare_checkpoints(tmp_path / "c", settings, IGNORED, fresh=True)
    assert not list((tmp_path / "c").glob("checkpoint-*"))


def test_names_of_changed_settings_are_told_and_ignored_ones_are_not():
    before = {"learning_rate": 1, "report_to": "none", "gone": 2}
    assert runs.changes(before, {"learning_rate": 3, "report_to": "wandb", "new": [1]}, IGNORED) == (
        "gone 2 -> None, learning_rate 1 -> 3, new None -> [1]"
    )
    assert runs.changes({"path": "a"}, {"path": runs.Path("a")}, set()) == ""  # as the file would hold it


def test_what_was_there_goes_only_when_the_new_files_come(tmp_path):
    output, staging = tmp_path / "output", tmp_path / "staging"
    for directory, text in ((output, "old"), (staging, "new")):
        (directory / "plots").mkdir(parents=True)
        for name in ("config.json", "model.safetensors", "plots/a.png"):
            (directory / name).write_text(text)
    (output / "plots" / "stale.png").touch()
    (output / "demonstration.json").touch()
    (output / "checkpoints").mkdir()
    runs.publish(staging, output)
    assert {path.name for path in output.iterdir()} == {"config.json", "model.safetensors", "plots", "checkpoints"}
    assert {path.read_text() for path in output.rglob("*") if path.is_file()} == {"new"}


def test_a_run_that_is_refused_leaves_no_directory(tmp_path):
    for there in (False, True):
        if there:
            (tmp_path / "output").mkdir()
        with pytest.raises(InputError, match="refused"), runs.held_output(tmp_path / "output"):
            raise InputError("refused")
        assert (tmp_path / "output").exists() == there


def test_staging_is_cleared_before_and_after(tmp_path):
    (tmp_path / ".new").mkdir()
    (tmp_path / ".new" / "half").touch()
    with pytest.raises(RuntimeError), runs.staging_directory(tmp_path) as staging:
        assert not staging.exists()
        staging.mkdir()
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("architecture, rewards, fine", [
    ("LlamaForSequenceClassification", True, True), ("LlamaForCausalLM", True, False),
    ("LlamaForSequenceClassification", False, False), ("LlamaForCausalLM", False, True),
])  # fmt: skip
def test_a_model_of_the_other_kind_is_not_overwritten(tmp_path, monkeypatch, architecture, rewards, fine):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    if fine:
        runs.claim_output(tmp_path, [], rewards)
    else:
        with pytest.raises(InputError, match=f"holds a {architecture}, which would be overwritten"):
            runs.claim_output(tmp_path, [], rewards)
    with pytest.raises(InputError, match="this run reads the model there"):
        runs.claim_output(tmp_path, [str(tmp_path)], rewards)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    with pytest.raises(InputError, match="this run reads the model there"):
        runs.claim_output(tmp_path, ["some/model", f"~/{tmp_path.name}"], rewards)
