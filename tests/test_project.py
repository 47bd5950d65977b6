"""What the project says of itself agrees with itself: requirements, versions, Makefile."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BY_NEED = {"gguf"}  # imported by `transformers` for the packaged weights, not by this project


def pins(*names: str) -> dict[str, str]:
    """Name and version of every line of these files."""
    lines = [line.split("#")[0].strip() for name in names for line in (ROOT / name).read_text().splitlines()]
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if line}


def brought_along(roots: dict[str, str]) -> set[str]:
    """Names of all packages that these ask for here, themselves included."""
    found: set[tuple[str, str]] = set()
    waiting = [(name, "") for name in roots]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) not in found:
            found.add((name, extra))
            for text in importlib.metadata.requires(name) or []:
                needed = Requirement(text)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    waiting += [(canonicalize_name(needed.name), each) for each in ("", *needed.extras)]
    return {name for name, _ in found}


def test_the_package_asks_for_what_the_tests_run_with():
    asked = {canonicalize_name(each.name): each for each in map(Requirement, PROJECT["dependencies"])}
    pinned = pins("requirements.txt")
    assert asked.keys() == pinned.keys()
    for name, version in pinned.items():
        assert version in asked[name].specifier, name
        assert ">=" + ".".join(version.split(".")[:2]) in map(str, asked[name].specifier), name  # older ones: untried


def test_what_the_page_needs_beside_them_is_an_extra():
    (gradio,) = map(Requirement, PROJECT["optional-dependencies"]["page"])
    pinned = pins("requirements-app.txt")
    assert pinned.keys() == {gradio.name} and pinned[gradio.name] in gradio.specifier


def test_all_that_is_imported_is_asked_for_and_nothing_else():
    imported = set()
    for path in [*ROOT.glob("*.py"), *(ROOT / "reward_pipeline").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.split(".")[0] for name in names}
    packages = importlib.metadata.packages_distributions()
    foreign = imported - sys.stdlib_module_names - {"reward_pipeline"}
    assert {canonicalize_name(packages[name][0]) for name in foreign} == (
        pins("requirements.txt", "requirements-app.txt").keys() - BY_NEED
    )


@pytest.mark.skipif(sys.platform != "linux", reason="other systems bring other packages along")
def test_what_is_brought_along_is_pinned_and_nothing_else():
    named = pins("requirements.txt", "requirements-app.txt", "requirements-dev.txt")
    cuda = re.compile("nvidia-.*|cuda-.*|triton")  # torch pins them itself
    unpinned = {name for name in brought_along(named) if not cuda.fullmatch(name)} - {"pip"} - named.keys()
    assert unpinned == pins("constraints.txt").keys()


def test_there_is_one_version_and_one_range_of_pythons():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## \[(.*)\] - (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest.groups() == (citation["version"], str(citation["date-released"]))
    assert citation["version"] == PROJECT["version"]
    asked = Requirement(f"python {PROJECT['requires-python']}").specifier
    pythons = [f"3.{minor}" for minor in range(100) if f"3.{minor}" in asked]
    assert pythons == re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    bounds = [tuple(map(int, each.split("."))) for each in (pythons[0], pythons[-1])]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"not {bounds[0]} <= sys.version_info[:2] <= {bounds[1]})" in makefile


def make(directory, *arguments) -> subprocess.CompletedProcess:
    if shutil.which("make") is None:
        pytest.skip("no make here")
    shutil.copy(ROOT / "Makefile", directory)
    for name in ("requirements", "requirements-app", "requirements-dev", "requirements-weights", "constraints"):
        (directory / f"{name}.txt").touch()
    return subprocess.run(["make", *arguments], cwd=directory, capture_output=True, text=True)


def test_bare_make_lists_every_target(tmp_path):
    shown = re.findall(r"^  (\w+) +\S", make(tmp_path).stdout, re.MULTILINE)
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {*shown} == {*targets} - {"environment"}


@pytest.mark.parametrize("left", ["python", "nothing"])
def test_a_venv_of_another_python_or_half_of_one_is_noticed(tmp_path, left):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    if left == "python":
        python = tmp_path / ".venv" / "bin" / "python"
        python.write_text("#!/bin/sh\nexit 1\n")  # as an older one answers to what `make` asks
        python.chmod(0o755)
    done = make(tmp_path, "data")
    assert done.returncode and "error: .venv is incomplete, or its Python is not 3.11 to 3.13: rm -r" in done.stderr


def test_an_older_python_is_refused(tmp_path):
    done = make(tmp_path, "data", "PYTHON=false")
    assert done.returncode and "error: no Python 3.11 to 3.13" in done.stderr
    assert not (tmp_path / ".venv").exists()
