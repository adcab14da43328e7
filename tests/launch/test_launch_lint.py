"""Linters for shell scripts and Dockerfiles, and project rules that no linter checks."""

import re
import runpy
import subprocess

import pytest
from launchers import LAUNCH, ROOT, dry_run, launch, program

from vilam3_jax.training.initialization import InitConfig

SCRIPTS = sorted(LAUNCH.glob("*.sh"))
DOCKERFILES = sorted((LAUNCH / "docker").glob("Dockerfile.*"))


def lint(name, *arguments, text=None):
    found = program(name)
    assert found, f"{name} is not installed; pip install -e '.[dev]'"
    done = subprocess.run(
        [found, *arguments], input=text, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    lint("shellcheck", "--external-sources", str(script))


def test_shellcheck_sees_a_fault():
    with pytest.raises(AssertionError, match="SC2086"):
        lint("shellcheck", "-", text="#!/bin/bash\nread -r name\nrm $name\n")


@pytest.mark.parametrize("processes", ["gpu", "node"])
def test_batch_job_is_clean(processes):
    done = launch(
        "slurm_gpu.sh", "--nodes=2", "--gpus-per-node=4", "--time=1:00:00", f"--processes={processes}",
        "--env=A=b c", "--dry-run", "--", "--config=a", "--workdir=/shared/run",
    )  # fmt: skip
    lint("shellcheck", "-", text="\n".join(done.stdout.splitlines()[1:-1]) + "\n")


def test_batch_job_of_ray_is_clean():
    done = launch(
        "slurm_ray.sh", "--nodes=2", "--gpus-per-node=4", "--time=1:00:00", "--env=A=b c", "--dry-run", "--",
        "--expert=CXR", "--data=/shared/a", "--out=/shared/b",
    )  # fmt: skip
    lint("shellcheck", "-", text="\n".join(done.stdout.splitlines()[1:-1]) + "\n")


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint(file):
    lint("hadolint", str(file))


def instructions(file):
    """Pairs (instruction, arguments), with continued lines joined."""
    text = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", file.read_text(), flags=re.MULTILINE))
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda path: path.name)
def test_rules_of_images(file):
    lines = instructions(file)
    stages = [words.split()[0] for name, words in lines if name == "FROM"]
    assert len(stages) == 2  # sources and build tools are left out of the image
    for base in stages:
        assert re.search(r":\d+\.\d+\.\d+-[\w-]+$|@sha256:[0-9a-f]{64}$", base), base
    last = lines[max(i for i, (name, _) in enumerate(lines) if name == "FROM") :]
    defaults = dict(words.split("=") for name, words in last if name == "ARG" and "=" in words)
    (user,) = [words for name, words in last if name == "USER"]
    user = re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], user)
    assert user.isdigit() and user != "0"
    for name, words in lines:
        if name in ("ENV", "ARG"):
            assert not re.search(r"token|secret|password|key", words, re.IGNORECASE), words
        if name == "ADD":
            raise AssertionError("use COPY, which neither downloads nor unpacks")
        for install in re.findall(r"pip install ([^&]*)", words):
            assert "-c constraints/py311.txt" in install
    entry = next(words for name, words in last if name == "ENTRYPOINT")
    assert entry == '["/vilam3/run.sh"]'


def test_torch_and_cuda_jax_are_never_in_one_image():
    for file in DOCKERFILES:
        words = " ".join(words for _, words in instructions(file))
        has_torch = "./experts" in words
        has_accelerated_jax = bool(re.search(r"\[(\$\{ACCELERATOR\}|tpu|cuda)", words))
        assert has_torch != has_accelerated_jax, file
        # The build of the image checks this, too.
        looked = re.findall(r'! /vilam3/venv/bin/python -c "import (\w+)"', words)
        assert looked == (["jax_cuda12_plugin", "libtpu"] if has_torch else ["torch"])


def test_images_are_built_from_the_sources_alone():
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    assert "*" in ignored
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    assert {"vilam3_jax", "configs", "experts", "constraints", "setup.cfg", "pyproject.toml"} <= allowed
    assert not {".git", ".cache", "runs", "."} & allowed
    assert all((ROOT / name).exists() for name in allowed)


def test_pins_of_images_cover_the_extras():
    pins = {
        line.split("==")[0]: line.split("==")[1].strip()
        for name in ("py311", "cloud-py311", "cuda-py311")
        for line in (ROOT / f"constraints/{name}.txt").read_text().splitlines()
        if "==" in line
    }
    assert pins["jax-cuda12-plugin"] == pins["jax-cuda12-pjrt"] == pins["jax"] == pins["jaxlib"]
    assert {"libtpu", "gcsfs", "nvidia-cudnn-cu12", "nvidia-nccl-cu12"} <= set(pins)


@pytest.mark.parametrize("script", ["tpu_vm.sh", "slurm_gpu.sh", "slurm_ray.sh", "gke.py"])
def test_help_explains(script):
    done = launch(script, "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith("usage: ")
    assert "example:" in done.stdout


def test_dry_run_needs_no_program():
    assert dry_run("tpu_vm.sh", "delete", "--name=m3", "--project=my-project", "--zone=us-east5-a")
    for arguments in (["2", "--dry-run"], ["--dry-run", "2"]):
        done = launch("local.sh", *arguments, "--config=a", "--workdir=b c")
        assert done.returncode == 0 and not done.stderr
        lines = done.stdout.splitlines()
        assert [line.split()[-1] for line in lines] == ["--process_id=0", "--process_id=1"]
        assert all("-m vilam3_jax.train --config=a '--workdir=b c'" in line for line in lines)


def test_an_environment_without_the_package_is_one_line(monkeypatch):
    monkeypatch.setenv("PYTHON", "false")
    done = subprocess.run(
        [LAUNCH / "local.sh", "2", "--config=a"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "local.sh: error: false has no vilam3_jax or no jax; activate its environment, or set PYTHON\n"
    )


def test_the_launchers_know_the_paths_of_a_run():
    """All settings that are paths must be checked, including new ones."""
    done = subprocess.run(
        ["bash", "-c", '. "$0" && printf "%s\\n" "${PATH_FLAGS[@]}"', str(LAUNCH / "common.sh")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    gke = runpy.run_path(str(LAUNCH / "gke.py"))["PATH_FLAGS"]
    parts = (f"config.init.{component}" for component in InitConfig().to_dict())
    expected = {"config.data.path", "config.data.annotations", "config.model.tokenizer", *parts}
    assert set(done.stdout.split()) == set(gke) == expected
