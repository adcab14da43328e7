"""The code of docs/asking.md runs as it is written."""

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

PAGE = Path(__file__).parents[2] / "docs" / "asking.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch, export, world):
    """What the page refers to, with a short name each."""
    shutil.copytree(export, tmp_path / "runs" / "quickstart" / "export")
    shutil.copytree(world.annotations, tmp_path / "runs" / "quickstart" / "annotations")
    shutil.copy(world.volume, tmp_path / "ct.nii.gz")
    Image.open(world.film).save(tmp_path / "film.jpeg")
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_the_code_of_the_page_runs(folder, capsys):
    assert len(BLOCKS) >= 5
    names = {}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), names)
    assert len(names["five"]) == 5 and len(names["chat"].replies) == 3
    assert len(names["model"].generator._params) and "Not for clinical use" in capsys.readouterr().out
