"""The same course on Stable Diffusion: real architecture, vocabulary and labels, from a hub that is on disk."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from duge_lite.models import DEFAULT_REAL_MODEL

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def run(number: str, hub: Path, monkeypatch) -> nbformat.NotebookNode:
    """Executes a notebook as on Colab, without its `assert`s: claims about pictures need trained weights."""
    environment = {"DUGE_MODEL": DEFAULT_REAL_MODEL, "HF_HOME": str(hub), "PYTHONOPTIMIZE": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (path,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    return notebook


@pytest.mark.slow
@pytest.mark.parametrize("number", ["00", "01", "02", "03", "04"])
def test_notebook_runs(number, hub, monkeypatch):
    printed = "".join(
        out.text
        for cell in run(number, hub, monkeypatch).cells
        for out in cell.get("outputs", ())
        if out.output_type == "stream" and out.name == "stdout"
    )
    told = [line for line in printed.splitlines() if line.startswith("no oracle")]
    assert told == ([NO_ORACLE] if number == "03" else [])
