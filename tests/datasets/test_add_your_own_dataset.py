"""The dataset of docs/add_your_own_dataset.md, installed beside the package and found by its entry point."""

import configparser
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from twins import made, picture, write

from vilam3_jax.datasets import prepare, registry
from vilam3_jax.errors import UserError

PAGE = Path(__file__).parents[2] / "docs" / "add_your_own_dataset.md"


def blocks(language, page=PAGE):
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs the page's module like a distribution, with its entry points."""
    settings = configparser.ConfigParser()
    settings.read_string(blocks("ini")[0])
    ((group, points),) = settings["options.entry_points"].items()
    site = write(
        tmp_path / "site",
        {
            "polyps.py": blocks("python")[0],
            "my_datasets-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: my-datasets\nVersion: 1.0\n",
            "my_datasets-1.0.dist-info/entry_points.txt": f"[{group}]\n{points}\n",
        },
    )
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    yield
    sys.modules.pop("polyps", None)


@pytest.fixture
def source(tmp_path):
    rows = [
        ["file", "size_mm", "split", "patient"],
        ["1.png", "7.5", "train", "p1"],
        ["2.png", "30", "test", "p2"],
    ]
    pictures = {f"images/{n}.png": picture(n, kind="PNG") for n in (1, 2)}
    return write(tmp_path / "source", {"polyps.csv": [*rows, ["3.png", "4", "test", "p3"]], **pictures})


def test_it_is_found_by_its_entry_point(installed, source):
    assert "polyps" in registry.names() and "polyps" not in registry.DATASETS
    examples, skipped = made(registry.get("polyps"), source)
    assert [one.id for one in examples["train"] + examples["test"]] == ["1.png", "2.png"]
    assert examples["train"][0].turns[1].text == "7.5 mm"
    assert [one.reason for one in skipped["test"]] == ["image images/3.png is missing"]
    assert "p1" not in json.dumps([one.meta for one in examples["train"]])


def test_it_is_unknown_where_it_is_not_installed():
    assert "polyps" not in registry.names()
    with pytest.raises(UserError, match=r"no dataset 'polyps'; there are: .*pmc_vqa"):
        registry.get("polyps")


def test_one_name_is_one_dataset(installed, tmp_path, monkeypatch):
    """A name registered twice, or the name of one of our datasets, is refused."""
    other = {
        "other-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: other\nVersion: 1.0\n",
        "other-1.0.dist-info/entry_points.txt": "[vilam3.datasets]\npolyps = a:B\nslake = a:B\nbroken = a:B\n"
        "function = os:getcwd\n",
    }
    monkeypatch.syspath_prepend(str(write(tmp_path / "more", other)))
    for name in ("polyps", "slake"):
        with pytest.raises(UserError, match=f"dataset '{name}': several packages have one .*other"):
            registry.get(name)
    with pytest.raises(
        UserError, match=r"dataset 'broken' of other 1\.0 cannot be loaded: No module named 'a'"
    ):
        registry.get("broken")
    with pytest.raises(
        UserError, match=r"dataset 'function' of other 1\.0: os:getcwd is not a subclass of Dataset"
    ):
        registry.get("function")
    listed = {line.split()[0]: line for line in prepare.listing().splitlines()}
    assert "cannot be loaded" in listed["broken"] and "CC0-1.0" in listed["vqa_rad"]


def test_the_test_of_the_page_passes(installed, tmp_path):
    names: dict = {}
    exec(compile(blocks("python")[1], str(PAGE), "exec"), names)  # our own page
    folder = tmp_path / "twin"
    folder.mkdir()
    names["test_polyps"](folder)


def test_tfds_reads_what_is_built_of_it(installed, source, tmp_path, capsys):
    import tensorflow_datasets as tfds

    from vilam3_jax.datasets import builder

    built = builder.prepare(registry.get("polyps")(), source, tmp_path / "out")
    assert built.folder == tmp_path / "out" / "polyps" / "1.0.0"
    records: Any = tfds.builder_from_directory(built.folder).as_data_source()
    assert [record["id"] for record in records["train"]] == [b"1.png"]
    assert built.info["splits"]["test"]["skipped"]["total"] == 1

    (reading,) = blocks("python", PAGE.with_name("datasets.md"))  # of the overview, for this dataset
    reading = reading.replace('"data', f'"{tmp_path / "out"}').replace("slake/en", "polyps")
    capsys.readouterr()
    exec(compile(reading, "datasets.md", "exec"), {})
    assert capsys.readouterr().out.startswith("b'1.png' [b'<image>\\nHow large is the polyp?', b'7.5 mm'] ")
