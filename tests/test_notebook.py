"""The notebook runs from top to bottom, and its committed outputs are whole."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "reward_model.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_runs_on_any_trained_model(notebook, train, tiny_model):
    output = train()
    constants, *rest = code_cells(notebook)
    assert "MODEL_PATH = " in constants.source and "SFT_MODEL = " in constants.source
    constants.source = f"MODEL_PATH = {str(output)!r}\nSFT_MODEL = {tiny_model!r}"
    for cell in rest:
        cell.outputs = []
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
    texts = ["".join(each.get("text", "") for each in cell.outputs) for cell in code_cells(notebook)]
    assert any("accuracy " in text for text in texts)
    pictures = [each for cell in rest for each in cell.outputs if "image/png" in each.get("data", {})]
    assert len(pictures) == 4


def test_outputs_are_committed_and_name_no_machine(notebook):
    for cell in code_cells(notebook)[1:]:
        assert cell.outputs, cell.source
        assert all(each.output_type != "error" for each in cell.outputs)
        text = str([each.get("text", "") or each.get("data", {}).get("text/plain", "") for each in cell.outputs])
        assert str(NOTEBOOK.parents[1]) not in text and str(Path.home()) not in text and "/tmp/" not in text
