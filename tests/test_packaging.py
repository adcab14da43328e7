"""Package metadata is in one place, and the wheel is complete."""

import configparser
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def read_cfg(path):
    parser = configparser.ConfigParser()
    parser.read(path)
    return parser


def lines(text):
    return {line.strip() for line in text.splitlines() if line.strip()}


def test_every_package_is_listed():
    listed = lines(read_cfg(ROOT / "setup.cfg")["options"]["packages"])
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "vilam3_jax").rglob("__init__.py")}
    for file in (ROOT / "configs").rglob("__init__.py"):
        found.add(".".join(("vilam3_jax", *file.parent.relative_to(ROOT).parts)))
    assert listed == found


def test_every_data_file_is_packaged():
    patterns = lines(read_cfg(ROOT / "setup.cfg")["options.package_data"]["vilam3_jax"])
    package = ROOT / "vilam3_jax"
    packaged = {file for pattern in patterns for file in package.glob(pattern)}
    data = {
        f
        for f in package.rglob("*")
        if f.is_file() and f.suffix not in (".py", ".pyc") and "__pycache__" not in f.parts
    }
    assert data == packaged


def test_no_key_stands_in_both_files():
    for folder in (ROOT, ROOT / "experts"):
        toml = tomllib.loads((folder / "pyproject.toml").read_text())
        if (folder / "setup.cfg").exists():
            assert "project" not in toml
            assert "setuptools" not in toml.get("tool", {})
            assert not [name for name in read_cfg(folder / "setup.cfg").sections() if name.startswith("tool")]
