"""The notebooks: stripped in the repository, and executed one after the other on one storage."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def execute(name: str) -> NotebookNode:
    """Runs a notebook where it lies, as Jupyter does; an error in a cell is raised."""
    (path,) = FOLDER.glob(f"{name}*.ipynb")
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(FOLDER)}}
    client = NotebookClient(notebook, timeout=300, startup_timeout=300, resources=where)
    return client.execute()


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [out for cell in notebook.cells for out in cell.get("outputs", ())]


def printed(notebook: NotebookNode) -> str:
    """Returns all text that the cells gave out."""
    texts = [
        out.get("text") or out.get("data", {}).get("text/plain", "") for out in outputs(notebook)
    ]
    return "\n".join(texts)


def num_pictures(notebook: NotebookNode) -> int:
    return sum("image/png" in out.get("data", {}) for out in outputs(notebook))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stripped(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell.source for cell in code if cell.outputs or cell.execution_count]
    assert {cell.get("metadata") == {} for cell in notebook.cells} == {True}


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NotebookNode]:
    """The first notebook, executed; the others find what it has left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDSCALE_STORAGE", str(tmp_path_factory.mktemp("notebooks")))
        patch.setenv("KDSCALE_SETTINGS", '{"max_steps": 12}')
        package = [str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, package)))
        yield execute("01")


@pytest.mark.ray
@pytest.mark.timeout(900)
class TestExecution:
    """In this order."""

    def test_quickstart(self, quickstart: NotebookNode) -> None:
        text = printed(quickstart)
        assert "3 trials, 4 distinct stages" in text
        assert "All 4 stages are finished." in text
        assert len(re.findall(r"^vit_t16 .*%  \[.*n = 2000$", text, re.MULTILINE)) == 3
        assert num_pictures(quickstart) == 3

    def test_reading(self, quickstart: NotebookNode) -> None:
        notebook = execute("02")
        text = printed(notebook)
        assert "All 4 stages are finished." in text
        assert len(re.findall(r"FINISHED distill: vit_t16", text)) == 3
        assert num_pictures(notebook) == 4

    def test_cka(self, quickstart: NotebookNode) -> None:
        notebook = execute("03")
        assert len(re.findall(r"debiased -?\d\.\d{3}, biased \d\.\d{3}", printed(notebook))) == 3
        assert num_pictures(notebook) == 4

    def test_own_loss(self, quickstart: NotebookNode) -> None:
        notebook = execute("04")
        text = printed(notebook)
        assert "to run: 1 of 3 stages (2 reused)" in text
        assert "All 3 stages are finished." in text
        assert num_pictures(notebook) == 2
