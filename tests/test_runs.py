"""Output directories and checkpoints: whose they are, which run goes on, what is put into place."""

import json

import pytest

from reward_pipeline import runs
from reward_pipeline.files import InputError, write_checksums

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
            (directory / name).write_text('{"global_step": 2}')
    for step, state in {16: '{"cut o', 18: "{}", 20: "[]"}.items():
        (tmp_path / "c" / f"checkpoint-{step}").mkdir()
        (tmp_path / "c" / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert runs.last_checkpoint(tmp_path / "c") == str(tmp_path / "c" / "checkpoint-10")
    runs.prepare_checkpoints(tmp_path / "c", settings, IGNORED, fresh=False)
    assert runs.last_checkpoint(tmp_path / "c") == str(tmp_path / "c" / "checkpoint-10")
    runs.prepare_checkpoints(tmp_path / "c", settings, IGNORED, fresh=True)
    assert not list((tmp_path / "c").glob("checkpoint-*"))


def saved(checkpoints, step):
    """A checkpoint as far as `runs` looks at it."""
    (checkpoints / f"checkpoint-{step}").mkdir(parents=True)
    (checkpoints / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"step": step}))


def test_what_is_replaced_is_kept_until_the_new_run_is_finished(tmp_path):
    checkpoints, old, new = tmp_path / "checkpoints", {"seed": 1}, {"seed": 2}
    runs.prepare_checkpoints(checkpoints, old, IGNORED, fresh=False)
    saved(checkpoints, 5)
    for _ in range(2):  # also where the new run is started twice
        runs.prepare_checkpoints(checkpoints, new, IGNORED, fresh=True)
        assert runs.last_checkpoint(checkpoints) is None
    runs.prepare_checkpoints(checkpoints, old, IGNORED, fresh=False)  # the new run has saved nothing
    assert runs.last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-5")

    runs.prepare_checkpoints(checkpoints, new, IGNORED, fresh=True)
    saved(checkpoints, 3)
    runs.prepare_checkpoints(checkpoints, new, IGNORED, fresh=False)
    assert runs.last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-3")
    assert runs.last_checkpoint(tmp_path / runs.REPLACED) == str(tmp_path / runs.REPLACED / "checkpoint-5")
    (tmp_path / "staging").mkdir()
    runs.publish(tmp_path / "staging", tmp_path)
    assert not (tmp_path / runs.REPLACED).exists() and runs.last_checkpoint(checkpoints)


def test_a_finished_run_is_known_by_its_result(tmp_path):
    settings, finished = {"seed": 1, "report_to": "none", "steps": 9}, tmp_path / "output"
    assert not runs.is_finished(finished, settings, IGNORED, fresh=False)
    finished.mkdir()
    (finished / "settings.json").write_text(runs.settings_text(settings))
    assert not runs.is_finished(finished, settings, IGNORED, fresh=False)  # without a model
    (finished / "config.json").write_text("{}")
    assert runs.is_finished(finished, settings | {"report_to": "wandb"}, IGNORED, fresh=False)
    assert not runs.is_finished(finished, settings, IGNORED, fresh=True)
    runs.claim_output(finished, [], rewards=True)  # though its checkpoints have been deleted
    refused = pytest.raises(InputError, match=r"holds a finished run with other settings \(steps 9 -> 20\); --fresh")
    with refused:
        runs.is_finished(finished, settings | {"steps": 20}, IGNORED, fresh=False)
    # A run that goes on, such as a longer one, is not finished.
    runs.prepare_checkpoints(finished / "checkpoints", settings, IGNORED, fresh=False)
    saved(finished / "checkpoints", 9)
    assert not runs.is_finished(finished, settings | {"steps": 20}, IGNORED, False, IGNORED | {"steps"})
    assert runs.is_finished(finished, settings, IGNORED, False, IGNORED | {"steps"})
    with pytest.raises(InputError, match="seed 1 -> 2"):
        runs.is_finished(finished, settings | {"seed": 2}, IGNORED, False, IGNORED | {"steps"})
    (finished / "model.safetensors").write_bytes(b"weights")
    write_checksums(finished)
    (finished / "model.safetensors").write_bytes(b"others")
    with pytest.raises(InputError, match=r"model\.safetensors: damaged.*--fresh makes it again"):
        runs.is_finished(finished, settings, IGNORED, fresh=False)


@pytest.mark.parametrize("text", ["{}", "[]", "null", "{"])
def test_settings_that_say_nothing_are_damaged(tmp_path, text):
    saved(tmp_path, 3)
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(InputError, match=r"settings\.json: damaged"):
        runs.prepare_checkpoints(tmp_path, {"seed": 1}, IGNORED, fresh=False)
    assert runs.last_checkpoint(tmp_path)


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
