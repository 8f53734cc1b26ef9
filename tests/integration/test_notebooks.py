"""Notebooks: script and notebook of a pair say the same, the notebook is committed without outputs, and it runs."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from ipykernel.kernelspec import install
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))
SCRIPT = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
LONGEST = 480
"""Seconds that a cell, or the start of the kernel, may take on a busy machine; idle, a notebook takes a minute."""


def test_every_notebook_is_a_pair():
    assert len(SCRIPTS) == 3
    assert [path.stem for path in SCRIPTS] == sorted(path.stem for path in FOLDER.glob("*.ipynb"))


@SCRIPT
def test_script_and_notebook_are_in_sync(script):
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    ours, theirs = (
        [(cell.cell_type, cell.source) for cell in pair.cells] for pair in (jupytext.read(script), notebook)
    )
    assert ours == theirs, "edit the .py, then: uv run jupytext --sync notebooks/*.py"


@SCRIPT
def test_committed_without_outputs(script):
    path = script.with_suffix(".ipynb")
    assert path.stat().st_size < 1_000_000
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs"), cell.source
        assert cell.get("execution_count") is None, cell.source


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Name of a kernel of the interpreter that runs the tests, whatever kernels the machine has installed."""
    install(prefix=str(tmp_path), kernel_name="tests")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share" / "jupyter"))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")  # what jupyter_core otherwise warns about
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the notebooks write
    return "tests"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@SCRIPT
def test_runs(script, kernel):
    notebook = jupytext.read(script)
    limits = {"timeout": LONGEST, "startup_timeout": LONGEST}
    NotebookClient(notebook, kernel_name=kernel, resources={"metadata": {"path": str(FOLDER)}}, **limits).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    said = [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    assert not [text for text in said if "Warning" in text]
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(figures) >= 4
