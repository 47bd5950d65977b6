"""Output directories, checkpoints, and going on where a run stopped."""

import contextlib
import itertools
import json
import pickle
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from reward_pipeline.files import (
    InputError,
    allow_as_usual,
    check_files,
    first_line,
    json_lines,
    replace_directory,
    sole_writer,
    write_checksums,
    write_text,
)
from reward_pipeline.models import load_sft_model, quiet_transformers
from reward_pipeline.processes import together

CHECKPOINT_REMEDY = "delete this checkpoint, the one before it is used then, or start over by --fresh"
LOCK = ".lock"  # in the output directory while a run writes there
REPLACED = "checkpoints.old"  # what --fresh replaces, until the new run is finished
OUTPUT_FILES = {"metrics.json", "rewards.csv", "mistakes.md", "report.txt", "plots"}  # of an evaluation


def changes(before: dict[str, Any], settings: dict[str, Any], ignored: set[str]) -> str:
    """Settings in which a run differs from an earlier one, as `name before -> now`; empty for the same ones."""
    now = json.loads(settings_text(settings))
    names = sorted((before.keys() | now.keys()) - ignored)
    return ", ".join(
        f"{name} {before.get(name)} -> {now.get(name)}" for name in names if before.get(name) != now.get(name)
    )


def is_finished(
    output: Path, settings: dict[str, Any], ignored: set[str], fresh: bool, ignored_on_resume: set[str] | None = None
) -> bool:
    """Whether the result in a directory is that of a run with these settings; the same in all processes.

    Not so where the checkpoints there are of a run with these settings that has not come to its result yet.

    Args:
        ignored: names of settings that do not change the result.
        ignored_on_resume: names of settings that do not change the updates, where these are more.

    Raises:
        InputError: it is the result of a run with other settings, which would be replaced; or it is damaged.
    """

    def look() -> bool:
        if fresh or not (output / "config.json").is_file() or not (result := read_settings(output)):
            return False
        changed = changes(result, settings, ignored)
        if not changed:
            check_files(output, "--fresh makes it again")
            return True
        checkpoints = output / "checkpoints"
        running = read_settings(checkpoints) if last_checkpoint(checkpoints) else None
        if running and not changes(running, settings, ignored_on_resume or ignored):
            return False
        raise InputError(
            f"{output}: holds a finished run with other settings ({changed}); "
            "--fresh replaces it when the new run is finished, another --output_dir keeps both"
        )

    return together(look, first_alone=True)


def prepare_checkpoints(checkpoints: Path, settings: dict[str, Any], ignored: set[str], fresh: bool) -> None:
    """Keep the checkpoints of a run with these settings; otherwise begin with an empty directory.

    What `fresh` replaces is kept beside them until `publish`, and put back where the new run has saved nothing.

    Args:
        ignored: names of settings that may differ.

    Raises:
        InputError: the checkpoints there belong to a run with other settings.
    """
    replaced = checkpoints.with_name(REPLACED)
    if fresh and last_checkpoint(checkpoints) and not replaced.exists():
        checkpoints.rename(replaced)
    elif not fresh and replaced.exists() and not last_checkpoint(checkpoints):
        shutil.rmtree(checkpoints, ignore_errors=True)
        replaced.rename(checkpoints)
    if not fresh and last_checkpoint(checkpoints) and (before := read_settings(checkpoints)):
        changed = changes(before, settings, ignored)
        if not changed:
            return
        raise InputError(
            f"{checkpoints}: holds an unfinished run with other settings ({changed}); "
            "--fresh starts over, another --output_dir keeps both"
        )
    with replace_directory(checkpoints, marker="settings.json") as directory:
        write_text(directory / "settings.json", settings_text(settings))


def settings_text(settings: dict[str, Any]) -> str:
    """Settings as `settings.json` holds them; what JSON does not know as its text."""
    return json.dumps(settings, indent=2, default=str) + "\n"


def checkpoint_to_resume(
    checkpoints: Path,
    settings: dict[str, Any],
    ignored: set[str],
    fresh: bool,
    named: str | None = None,
    fixed: Sequence[str] = (),
) -> str | None:
    """The checkpoint from which a run with these settings goes on, undamaged; the same in all processes.

    Args:
        checkpoints: where the run saves; prepared for it, see `prepare_checkpoints`.
        ignored: names of settings that do not change the result.
        named: a checkpoint that the user asked for instead of the last one; see `adopt_checkpoint`.
        fixed: names of settings that the named checkpoint brings along.
    """

    def choose() -> str | None:
        if named:
            adopt_checkpoint(Path(named), settings, checkpoints, ignored, fixed)
            return named
        prepare_checkpoints(checkpoints, settings, ignored, fresh)
        found = last_checkpoint(checkpoints)
        if found:
            check_files(found, CHECKPOINT_REMEDY)
        return found

    return together(choose, first_alone=True)


def last_checkpoint(checkpoints: Path) -> str | None:
    """The complete checkpoint with the most updates, if any."""
    complete = [path for path in checkpoints.glob("checkpoint-*") if is_complete(path)]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end; the trainer writes its state last."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and bool({"global_step", "step"} & state.keys())


def adopt_checkpoint(
    checkpoint: Path, settings: dict[str, Any], checkpoints: Path, ignored: set[str], fixed: Sequence[str]
) -> None:
    """Let a run with these settings, which saves into `checkpoints`, continue a checkpoint that the user named.

    Args:
        ignored: names of settings that may differ without making it another run.
        fixed: names of settings that can not differ, besides base model and data: the checkpoint brings them along.

    Raises:
        InputError: not a complete checkpoint, of another model or other data, with another optimiser; or what is in
            `checkpoints` belongs to another run, with which this one would be mixed up.
    """
    if not is_complete(checkpoint):
        raise InputError(f"{checkpoint}: not a complete checkpoint; name a checkpoint-N directory")
    check_files(checkpoint, CHECKPOINT_REMEDY)
    before = read_settings(checkpoint.parent) or json.loads(settings_text(settings))
    for name in ("base_weights", "data_identity", *fixed):
        if before.get(name) != settings[name]:
            raise InputError(f"{checkpoint}: its {name} is {before.get(name)}, that of this run {settings[name]}")
    if checkpoint.parent.resolve() != checkpoints.resolve():
        prepare_checkpoints(checkpoints, settings, ignored, fresh=False)
        return
    if changed := changes(before, settings, ignored):
        last = last_checkpoint(checkpoints) or checkpoints
        if Path(last).resolve() != checkpoint.resolve():
            raise InputError(
                f"{checkpoint}: {last} goes on from it with other settings ({changed}); give another --output_dir"
            )
        write_text(checkpoints / "settings.json", settings_text(settings))


def read_settings(directory: Path) -> dict[str, Any] | None:
    """Settings of the run that wrote these checkpoints or this result, if any.

    Raises:
        InputError: they can not be read.
    """
    path = directory / "settings.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged ({first_line(error)}); --fresh starts over") from error
    if not found or not isinstance(found, dict):
        raise InputError(f"{path}: damaged (holds no settings); --fresh starts over")
    return found


def claim_output(output: Path, needed: Sequence[str], rewards: bool) -> None:
    """Refuse a directory that holds something else than a model of this kind or its checkpoints, or a needed model.

    Args:
        needed: models that the run reads.
        rewards: whether the run makes a reward model.

    Raises:
        InputError: it does.
    """
    for model in needed:
        directory = Path(model).expanduser()  # a hub id is none
        if output.exists() and directory.exists() and output.samefile(directory):
            raise InputError(f"{output}: this run reads the model there; choose another --output_dir")
    marks = ("checkpoints", REPLACED, "settings.json")  # the checkpoints may have been deleted
    ours = output.is_dir() and (
        any((output / name).exists() for name in marks) or {each.name for each in output.iterdir()} <= {LOCK}
    )
    if output.exists() and not ours:
        raise InputError(f"{output}: holds other files, which a model would overwrite; choose another --output_dir")
    try:
        found = json.loads((output / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    except (OSError, ValueError, LookupError, TypeError):
        return  # no model, or a damaged one
    if str(found).endswith("ForSequenceClassification") != rewards:
        raise InputError(f"{output}: holds a {found}, which would be overwritten; choose another --output_dir")


@contextlib.contextmanager
def held_output(output: Path) -> Iterator[None]:
    """Keep other runs out of a directory of results until the block ends; the first process does it for all.

    Raises:
        InputError: in all processes, when another run is writing there or the directory can not be written.
    """
    made = not output.exists()
    try:
        with contextlib.ExitStack() as held:
            together(lambda: held.enter_context(sole_writer(output, output / LOCK)), first_alone=True)
            yield
    finally:
        if made:  # a run that was refused leaves nothing behind
            with contextlib.suppress(OSError):
                output.rmdir()


@contextlib.contextmanager
def staging_directory(output: Path) -> Iterator[Path]:
    """Name a directory for results before they are published; whatever is in it goes when the block ends.

    All processes enter it together; the first one clears up.
    """
    staging, first = output / ".new", PartialState().is_main_process
    if first:
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
    PartialState().wait_for_everyone()
    try:
        yield staging
    finally:
        if first:
            shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, output: Path) -> None:
    """Move finished files into place; `config.json` goes first and comes last, since nothing reads a model without."""
    allow_as_usual(staging)
    for stale in ("config.json", "demonstration.json"):
        (output / stale).unlink(missing_ok=True)
    for item in sorted(staging.iterdir(), key=lambda item: item.name == "config.json"):
        if item.is_dir():
            shutil.rmtree(output / item.name, ignore_errors=True)
        item.replace(output / item.name)
    shutil.rmtree(output / REPLACED, ignore_errors=True)


def evaluation_directory(output: str | Path | None) -> contextlib.AbstractContextManager[Path | None]:
    """Context of `replace_directory` for the files of an evaluation; None stays None.

    Opened before the scoring, so that a directory that can not be written is found before the work is done.

    Raises:
        InputError: the directory holds anything else, such as a model.
    """
    if not output:
        return contextlib.nullcontext()
    others = sorted({path.name for path in Path(output).glob("*")} - OUTPUT_FILES)
    if others:
        raise InputError(f"{output}: holds other files ({others[0]}) and would be replaced; choose another directory")
    return replace_directory(output, marker="rewards.csv")


# --- REINFORCE, whose updates no trainer counts


def save_policy_checkpoint(
    checkpoints: Path,
    step: int,
    baseline: dict[str, float],
    policy: Any,
    optimizer: Any,
    kept: int,
) -> None:
    """Policy, optimiser and the state of the baseline after an update in `checkpoint-N`; the latest ones are kept.

    Random numbers need no saving; see `reinforce.step_seed`.
    """
    with replace_directory(checkpoints / f"checkpoint-{step}", marker="trainer_state.json") as target:
        with quiet_transformers():
            policy.save_pretrained(target)
        torch.save(optimizer.state_dict(), target / "optimizer.pt")
        write_text(target / "trainer_state.json", json.dumps({"step": step, "baseline": baseline}, indent=2) + "\n")
        write_checksums(target)
    saved = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for old in saved[:-kept]:
        shutil.rmtree(old)


def load_policy_checkpoint(checkpoint: str | None, policy: Any, optimizer: Any) -> tuple[int, dict[str, float]]:
    """Let policy and optimiser go on from a checkpoint; without one they stay as they are.

    Returns:
        The number of the last update, and the state of the baseline after it.

    Raises:
        InputError: the checkpoint is damaged.
    """
    if not checkpoint:
        return 0, {}
    path = Path(checkpoint)
    policy.load_state_dict(load_sft_model(checkpoint).state_dict())
    try:
        optimizer.load_state_dict(torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu"))
        state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        return state["step"], state["baseline"]
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}/optimizer.pt: damaged ({first_line(error)}); {CHECKPOINT_REMEDY}") from error


def resume_log(checkpoints: Path, step: int) -> list[dict[str, Any]]:
    """The log of the updates up to the last checkpoint; what a killed run left of later ones is removed.

    Args:
        step: the last update that the checkpoint has.

    Raises:
        InputError: the log of these updates is not whole.
    """
    path = checkpoints / "metrics.jsonl"
    log: list[dict[str, Any]] = []
    if step:
        try:
            with path.open(encoding="utf-8") as file:
                log = [json.loads(line) for line in itertools.islice(file, step)]
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: damaged ({first_line(error)}); --fresh starts over") from error
        if len(log) < step:
            raise InputError(f"{path}: has {len(log)} updates, but the checkpoint has {step}; --fresh starts over")
    write_text(path, json_lines(log))
    for leftover in checkpoints.glob(".checkpoint-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return log
