"""The direction of imports, read from the sources."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "vilam3_jax"

# Package → the packages it may import. `config`, `paths`, `errors` may be imported anywhere.
ANYWHERE = {"config", "paths", "errors", "configs"}
BASE = {"checkpoints", "exports", "processes", "data", "models", "ops", "compat"}
ALLOWED = {
    "compat": set(),
    "ops": {"compat"},
    "models": {"ops", "compat"},
    "data": {"models", "ops", "compat"},
    "processes": {"compat"},
    "checkpoints": {"processes"},
    "exports": {"checkpoints", "processes", "models", "ops", "compat"},
    "datasets": {"data", "cli"},
    "training": BASE,
    "inference": BASE,
    "convert": BASE,
    "evals": BASE | {"inference", "cli"},
    "report": {"data", "checkpoints", "evals", "cli"},
    "train": BASE | {"training", "inference", "cli"},
    "plan": BASE | {"training", "cli"},
    "quickstart": {"checkpoints", "data", "datasets", "report", "cli"},
    "cli": {"evals", "train", "plan", "convert", "inference", "report", "datasets", "data"},
    "config": set(),
    "paths": set(),
    "errors": set(),
    "__init__": {"inference"},
}
WITHOUT_JAX = ("record", "images", "volumes", "dicom", "experts/")


def imported_modules(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def packages_of(file):
    found = set()
    for name in imported_modules(file):
        parts = name.split(".")
        if parts[0] == "vilam3_jax" and len(parts) > 1:
            found.add(parts[1])
    known = set(ALLOWED) | {"configs"}
    return found & known


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_direction(file):
    relative = file.relative_to(ROOT)
    package = relative.parts[0].removesuffix(".py")
    assert package in ALLOWED, f"{package} is new: give it a place in the order"
    wrong = packages_of(file) - ALLOWED[package] - ANYWHERE - {package}
    assert not wrong, f"{relative} imports {sorted(wrong)}"


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_no_torch_no_experts_no_transformers(file):
    tops = {name.split(".")[0] for name in imported_modules(file)}
    assert not tops & {"torch", "vilam3_experts", "transformers", "monai", "tensorflow", "pickle"}


def modules_after(code):
    script = f"{code}\nimport sys\nprint(sorted(m for m in sys.modules if '.' not in m))"
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ, JAX_PLATFORMS="cpu"),
    )
    return set(ast.literal_eval(result.stdout.strip().splitlines()[-1]))


def test_the_package_is_lazy():
    assert not modules_after("import vilam3_jax") & {"jax", "flax", "torch", "numpy"}


def test_record_modules_need_no_jax():
    data = ROOT / "data"
    names = [
        ".".join(("vilam3_jax", *path.relative_to(ROOT).with_suffix("").parts))
        for path in data.rglob("*.py")
        if str(path.relative_to(data)).startswith(WITHOUT_JAX) and path.stem != "records"
    ]
    assert len(names) >= 7
    loaded = modules_after("\n".join(f"import {name}" for name in names))
    assert not loaded & {"jax", "flax", "torch", "grain"}


def test_importing_every_module_leaves_torch_out():
    names = [
        ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
        for path in ROOT.rglob("*.py")
        if path.name != "__init__.py"
    ]
    loaded = modules_after("\n".join(f"import {name}" for name in sorted(names)))
    assert "jax" in loaded
    assert not loaded & {"torch", "tensorflow", "vilam3_experts"}
