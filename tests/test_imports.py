"""The direction of imports, read from the sources."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "vilam3_jax"

# From the bottom up: a package imports only from earlier rows. `cli` is imported for its exit codes.
LAYERS = (
    "errors",
    "runtime",
    "data",
    "sharding",
    "ops",
    "models",
    "checkpoints",
    "tasks",
    "training",
    "configs",
    "config",
    "convert",
    "inference",
    "serving",
    "plan",
    "evals",
    "report",
    "datasets",
    "quickstart",
    "train",
    "cli",
)
WITHOUT_JAX = ("record", "images", "volumes", "dicom", "experts/")


def module_level_imports(file):
    return _imports(ast.parse(file.read_text()).body)


def imported_modules(file):
    return _imports(ast.walk(ast.parse(file.read_text())))


def _imports(nodes):
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_direction(file):
    relative = file.relative_to(ROOT)
    package = relative.parts[0].removesuffix(".py")
    if package == "__init__":
        return
    assert package in LAYERS, f"{package} is new: give it a place in the order"
    imported = {name.split(".")[1] for name in module_level_imports(file) if name.startswith("vilam3_jax.")}
    above = LAYERS[LAYERS.index(package) + 1 :]
    wrong = imported & set(above) - {"cli"}
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
