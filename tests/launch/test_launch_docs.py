"""Commands on the pages in docs/: ours pass a dry run, and gcloud knows the flags of its own."""

import re
import shlex
import shutil
import subprocess

import pytest
from absl import flags as flags_lib
from launchers import ROOT, flags, launch

from vilam3_jax import config as config_lib
from vilam3_jax.plan import topology
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.training import program as program_lib

PAGES = ["launch_tpu_vm", "launch_gke", "launch_slurm"]


def commands(page):
    """Commands in the code blocks of a page, with continued lines joined, split by shell rules."""
    text = (ROOT / f"docs/{page}.md").read_text()
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    lines = re.sub(r"\\\n", " ", blocks).splitlines()
    return [shlex.split(line) for line in lines if line]


@pytest.mark.parametrize("page", [*PAGES, "annotate_at_scale"])
def test_our_commands_run_dry(page):
    ours = [command for command in commands(page) if command[0].startswith("launch/")]
    assert ours
    for command in ours:
        end = command.index("--") if "--" in command else len(command)
        script = command[0].removeprefix("launch/")
        done = launch(script, *command[1:end], "--dry-run", *command[end:])
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout


@pytest.mark.parametrize("page,slice_", list(zip(PAGES, ["v5p-128", "v5p-128", "v5e:4x8"], strict=True)))
def test_the_runs_are_whole(page, slice_):
    runs = [command[command.index("--") + 1 :] for command in commands(page) if "--" in command]
    runs = [argv for argv in runs if any(word.startswith("--config=") for word in argv)]
    assert runs
    for argv in runs:
        config = config_lib.parse(
            [word for word in argv if not word.startswith("--workdir=")], flags_lib.FlagValues()
        )
        program_lib.build(config, mesh_lib.build_mesh(config.mesh, topology.parse(slice_).devices()))
        assert config.init.everything and config.data.path
        assert config.model.tokenizer and config.model.text["split"] == "as_trained"
        assert config.data.annotations or config.data.experts == "off"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_the_pages_name(page):
    text = (ROOT / f"docs/{page}.md").read_text()
    for name in re.findall(r"(?:launch|constraints|configs|docs)/[\w./-]*\w", text):
        assert (ROOT / name.rstrip(".")).exists(), name


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcloud"), reason="no gcloud here")
@pytest.mark.parametrize("page", PAGES[:2])
def test_gcloud_knows_the_flags(page):
    for command in commands(page):
        if command[0] != "gcloud":
            continue
        first = next((i for i, word in enumerate(command) if word.startswith("--")), len(command))
        for length in range(first, 1, -1):  # the last words may be arguments
            done = subprocess.run([*command[:length], "--help"], capture_output=True, text=True, check=False)
            if done.returncode == 0 and "SYNOPSIS" in done.stdout:
                break
        text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
        known = set(re.findall(r"--(?:\[no-\])?([a-z-]+)", text)) | {"project", "quiet"}
        assert set(flags(command)) <= known, (command, set(flags(command)) - known)
