"""The notebook runs from top to bottom, and its committed outputs are whole."""

import json
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from test_pair_metrics import random_columns

from reward_pipeline.cards import write_evaluation
from reward_pipeline.pair_metrics import pair_metrics

NOTEBOOK = ROOT / "notebooks" / "reward_model.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture
def trained(tiny_reward_model, tmp_path) -> Path:
    """A reward model with what an evaluation leaves beside it."""
    directory = tmp_path / "reward"
    shutil.copytree(tiny_reward_model, directory)
    columns = random_columns(40)
    metrics = pair_metrics(columns)
    (directory / "metrics.json").write_text(json.dumps(metrics))
    write_evaluation(columns, metrics, directory)
    return directory


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_runs_on_any_trained_model(notebook, trained, tiny_model, monkeypatch):
    """In a shell of this process: a kernel would import everything once more."""
    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.setattr(sys, "path", [*sys.path])  # put back at the end
    constants, *rest = code_cells(notebook)
    assert "MODEL_PATH = " in constants.source and "SFT_MODEL = " in constants.source
    constants.source = f"MODEL_PATH = {str(trained)!r}\nSFT_MODEL = {tiny_model!r}"
    for cell in rest:
        cell.source = cell.source.replace("max_new_tokens: int = 60", "max_new_tokens: int = 4")
    shell, texts = InteractiveShell(), ""
    for cell in (constants, *rest):
        with capture_output() as captured:
            shell.run_cell(cell.source).raise_error()
        texts += captured.stdout
    assert "accuracy " in texts and texts.count("display.Image object") == 4  # as a terminal shows pictures


@pytest.mark.parametrize("start", [ROOT, ROOT / "notebooks"])
def test_paths_begin_at_the_root_wherever_it_is_started(notebook, trained, start, monkeypatch, capsys):
    monkeypatch.chdir(start)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path).resolve() not in (ROOT, start)])
    constants, imports, *_ = code_cells(notebook)
    names: dict = {}
    exec(constants.source, names)
    assert names["MODEL_PATH"] == "reward_model_output"  # as `make run` writes it
    names["MODEL_PATH"] = str(trained)
    exec(imports.source, names)
    assert Path.cwd() == ROOT and sys.path[0] == str(ROOT)
    assert "accuracy " in capsys.readouterr().out


def test_outputs_are_committed_and_name_no_machine(notebook):
    for cell in code_cells(notebook)[1:]:
        assert cell.outputs, cell.source
        assert all(each.output_type != "error" for each in cell.outputs)
        text = str([each.get("text", "") or each.get("data", {}).get("text/plain", "") for each in cell.outputs])
        assert str(ROOT) not in text and str(Path.home()) not in text and "/tmp/" not in text
