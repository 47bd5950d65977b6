import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, flip_a_bit

from reward_pipeline import files
from reward_pipeline.files import InputError

# --- nothing half-written --------------------------------------------------------------------------------------------


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "result"
    with files.replace_directory(target, "mark") as directory:
        (directory / "mark").write_text("first")
    with pytest.raises(RuntimeError), files.replace_directory(target, "mark") as directory:
        (directory / "mark").write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    assert (target / "mark").read_text() == "first"
    with files.replace_directory(target, "mark") as directory:
        (directory / "b").write_text("second")
    assert [path.name for path in target.iterdir()] == ["b"]


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_a_link_leads_to_the_directory_that_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "result"
    link.symlink_to(tmp_path / "disk" / "result")
    for text in ("first", "second"):
        with files.replace_directory(link, "mark") as directory:
            (directory / "mark").write_text(text)
        assert link.is_symlink() and (link / "mark").read_text() == text
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["result"]


def test_a_whole_disk_is_not_replaced():
    with pytest.raises(InputError, match="can not be replaced"), files.replace_directory("/", "mark"):
        pass


def test_directories_of_others_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for target in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(InputError, match="holds other files"), files.replace_directory(target, "mark"):
            pass
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_failed_exchange_keeps_the_old_directory(tmp_path, monkeypatch):
    target = tmp_path / "result"
    with files.replace_directory(target, "mark") as directory:
        (directory / "mark").write_text("first")
    real = Path.rename

    def fail(path, new):
        if path.name.endswith(".tmp"):
            raise OSError("no space left")
        return real(path, new)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no space left"), files.replace_directory(target, "mark") as directory:
        (directory / "mark").write_text("second")
    assert (target / "mark").read_text() == "first"


def test_a_killed_exchange_is_mended(tmp_path):
    (tmp_path / ".result.old").mkdir()
    (tmp_path / ".result.old" / "mark").write_text("first")
    with pytest.raises(RuntimeError), files.replace_directory(tmp_path / "result", "mark"):
        raise RuntimeError
    assert (tmp_path / "result" / "mark").read_text() == "first"


def test_a_directory_has_one_writer(tmp_path):
    target = tmp_path / "deep" / "result"
    with files.replace_directory(target, "mark") as directory:
        (directory / "mark").write_text("first")
        with pytest.raises(InputError, match="result: another run is writing it"):
            files.replace_directory(target, "mark").__enter__()
        assert (directory / "mark").read_text() == "first"
        with files.replace_directory(target.with_name("other"), "mark"):
            pass  # another directory is no obstacle
    with files.replace_directory(target, "mark") as directory:
        (directory / "mark").write_text("second")
    assert (target / "mark").read_text() == "second"
    assert sorted(path.name for path in target.parent.iterdir()) == ["other", "result"]


HOLD_A_LOCK = """
import sys, time
from pathlib import Path
from reward_pipeline.files import sole_writer

with sole_writer(Path(sys.argv[1]), Path(sys.argv[1]) / ".lock"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_killed_process_keeps_nobody_out(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD_A_LOCK, tmp_path],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another run"), files.sole_writer(tmp_path, tmp_path / ".lock"):
            pass
    finally:
        process.kill()
        process.wait()
    with files.sole_writer(tmp_path, tmp_path / ".lock"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.txt"
    files.write_text(path, "first")
    with pytest.raises(RuntimeError), files.replace_file(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="is a directory"):
        files.write_text(tmp_path, "x")


def test_text_is_written_whole_and_directories_are_made(tmp_path):
    files.write_text(tmp_path / "new" / "a.txt", "broken \ud800")
    assert (tmp_path / "new" / "a.txt").read_text() == "broken ?"
    with pytest.raises(InputError, match="can not be written"):
        files.write_text(tmp_path / "new" / "a.txt" / "b.txt", "x")


def test_damage_is_named(tmp_path):
    for name in ("model.safetensors", "deep/optimizer.pt", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("many weights")
    files.write_checksums(tmp_path)
    assert json.loads((tmp_path / files.CHECKSUMS).read_text()).keys() == {"model.safetensors", "deep/optimizer.pt"}
    (tmp_path / "notes.txt").write_text("changed")  # people may
    files.check_files(tmp_path, "restore it")
    flip_a_bit(tmp_path / "deep" / "optimizer.pt")
    with pytest.raises(InputError, match=r"deep/optimizer\.pt: damaged, .*; restore it"):
        files.check_files(tmp_path, "restore it")
    shutil.rmtree(tmp_path / "deep")
    with pytest.raises(InputError, match=r"deep/optimizer\.pt: missing; restore it"):
        files.check_files(tmp_path, "restore it")


@pytest.mark.parametrize("content", ["[1]", "{", '{"model.safetensors": 5}', '{"../../secret.pt": "0"}'])
def test_checksums_may_be_anything(tmp_path, content):
    directory = tmp_path / "a" / "b"
    directory.mkdir(parents=True)
    for path in (directory / "model.safetensors", tmp_path / "secret.pt"):
        path.write_text("weights")
    (directory / "checksums.json").write_text(content)
    with pytest.raises(InputError, match=r"(can not be read|missing|damaged).*; try again"):
        files.check_files(directory, "try again")


def test_figures_are_rounded_for_readers():
    assert files.rounded({"a": [0.123456, {"b": 2 / 3}], "n": 7, "s": "1.23456"}) == {
        "a": [0.1235, {"b": 0.6667}],
        "n": 7,
        "s": "1.23456",
    }
    assert files.json_lines([{"a": "ё"}, {"b": 1}]) == '{"a": "ё"}\n{"b": 1}\n'


# --- the house: arrows one way ---------------------------------------------------------------------------------------


def rooms() -> list[str]:
    """The rooms of the package, in the order of the table in the docs."""
    table = (ROOT / "docs" / "files.md").read_text(encoding="utf-8").split("| room of `reward_pipeline/` |")[1]
    names = [line.split("|")[1] for line in table.partition("\n\n")[0].splitlines()[2:]]
    return [room for cell in names for room in re.findall(r"`(\w+)\.py`", cell)]


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names.update(f"{node.module}.{each.name}" for each in node.names)
    return names


def test_no_file_imports_a_script():
    scripts = {path.stem for folder in (ROOT, ROOT / "benchmarks") for path in folder.glob("*.py")}
    found = {
        f"{path.relative_to(ROOT)} imports {name}"
        for folder in (ROOT, *(ROOT / name for name in ("reward_pipeline", "benchmarks", "tests")))
        for path in folder.glob("*.py")
        for name in imported(path)
        if name.partition(".")[0] in scripts - {"measure"}  # of the benchmarks: what they share, and no script
    }
    assert sorted(found) == []


def test_rooms_import_only_rooms_above_them():
    package, order = ROOT / "reward_pipeline", rooms()
    assert sorted(path.stem for path in package.glob("*.py") if path.stem != "__init__") == sorted(order)
    names = {room: imported(package / f"{room}.py") for room in order}
    found = [
        f"{room} imports {other}"
        for number, room in enumerate(order)
        for other in order[number:]
        if f"reward_pipeline.{other}" in names[room]
    ]
    assert found == []


LIGHT = """
import json, sys
from reward_pipeline import InputError
import reward_model_demo
light = [*sys.modules]
from reward_pipeline import RewardModelEvaluator
assert reward_model_demo.RewardModelEvaluator is RewardModelEvaluator  # from the script too, as ever
print(json.dumps([light, [*sys.modules]]))
"""


def test_imports_are_light():
    """The package, its errors and a script need no large library, the evaluator none of those that training needs."""
    done = subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True, check=True)
    package, evaluator = ({name.partition(".")[0] for name in modules} for modules in json.loads(done.stdout))
    training = {"trl", "peft", "datasets", "pandas", "matplotlib"}
    assert sorted(package & (training | {"torch", "transformers", "numpy"})) == []
    assert "torch" in evaluator and sorted(evaluator & training) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_files_are_readable_as_new_ones_are(tmp_path):
    (tmp_path / "deep").mkdir(mode=0o700)
    for name in ("model.safetensors", "deep/a.png"):
        (tmp_path / name).touch(mode=0o600)
    before = os.umask(0o027)
    try:
        files.allow_as_usual(tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*")}
    assert modes == {"deep": "0o750", "model.safetensors": "0o640", "a.png": "0o640"}


def test_a_hash_is_remembered_only_as_long_as_the_file_is_what_it_was(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")
    first = files.file_hash(path)
    assert first == hashlib.sha256(b"one").hexdigest() == files.file_hash(path)
    path.write_bytes(b"two, longer")
    assert files.file_hash(path) == hashlib.sha256(b"two, longer").hexdigest()
