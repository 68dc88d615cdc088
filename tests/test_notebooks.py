"""The notebooks of docs/ run from top to bottom, on the starter model."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, starter, tmp_path, monkeypatch):
    """Every cell; what was committed has the same kinds of output, and no warning in it."""
    if "INTERP_STEER_CACHE" not in os.environ:
        # the starter is unpacked already; labels are not kept
        from interp_steer.util.files import cache_dir

        (tmp_path / "models").symlink_to(cache_dir("models"))
        monkeypatch.setenv("INTERP_STEER_CACHE", str(tmp_path))
    kept = nbformat.read(path, as_version=4)
    fresh = nbformat.read(path, as_version=4)
    NotebookClient(fresh, timeout=300, kernel_name="python3").execute()
    for mine, theirs in zip(kept.cells, fresh.cells, strict=True):
        assert mine.source == theirs.source
        if mine.cell_type != "code":
            continue
        kinds = [[kind(o) for o in cell.outputs if not over(o)] for cell in (mine, theirs)]
        assert kinds[0] == kinds[1], mine.source
        assert not any(o.get("name") == "stderr" for o in mine.outputs), mine.source


def over(output) -> bool:
    """Whether it is the place of progress that has come to its end."""
    return output.output_type == "display_data" and output.data.get("text/html") == ""


def kind(output) -> object:
    """What an output is, without what differs from machine to machine."""
    if output.output_type == "stream":
        return output.name
    return output.output_type, sorted(output.data)
