"""A whole run that has nothing but an object store: data, checkpoints, export, report."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.data.data_worlds import ct_annotation
from tests.training.bucket_server import serve
from tests.training.process_worlds import arguments, losses, make_world, run
from vilam3_jax.checkpoints import exports
from vilam3_jax.data.experts.store import AnnotationStore, AnnotationWriter
from vilam3_jax.datasets import train_tokenizer
from vilam3_jax.quickstart import prepare
from vilam3_jax.report import main as report
from vilam3_jax.runtime import paths

STEPS = 8
SETTINGS = {"num_steps": STEPS, "checkpoint_every": 2, "eval_every": 4, "mesh.cpu_devices": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def bucket(world):
    """The same datasets and tokenizer in `gs://bucket`, made by the same commands."""
    with serve("bucket"):
        store = "gs://bucket"
        prepare.main(["--source", f"{world}/samples", "--out", f"{store}/data", "--size", "smoke"])
        train_tokenizer.main(["--data", f"{store}/data", "--out", f"{store}/tokenizer", "--vocab_size=600"])
        yield store


def in_bucket(world, bucket, **settings):
    places = {"data.path": f"{bucket}/data", "model.tokenizer": f"{bucket}/tokenizer"}
    return arguments(world, f"{bucket}/run", **{**SETTINGS, **places, **settings})


def parameters(workdir):
    params = exports.load_export(paths.as_path(workdir) / "export")[0]
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


@pytest.mark.slow
def test_a_run_in_a_bucket_equals_one_on_a_disk(world, bucket):
    whole, folder = world / "whole", paths.as_path(f"{bucket}/run")
    run(world, 1, arguments(world, whole, **SETTINGS))
    run(world, 1, [*in_bucket(world, bucket), "--stop_after=5"])
    saved = folder / "checkpoints"
    assert [path.name for path in paths.children(saved)] == ["4", "5"]
    assert losses(folder) == {step: loss for step, loss in losses(whole).items() if step <= 5}

    # A copy from a disk has none of the markers that end a save here: it is not taken for an unfinished one.
    for place in ("", "state", "data", "run"):
        (saved / "5" / place / "commit_success.txt").unlink()
    said = run(world, 1, in_bucket(world, bucket), code=2)
    assert f"{saved / '5'}: is complete but has no commit_success.txt" in said
    for place in ("", "state", "data", "run"):
        (saved / "5" / place / "commit_success.txt").write_text("")
    assert "damaged" not in run(world, 1, [*in_bucket(world, bucket), "--stop_after=7"])
    assert [path.name for path in paths.children(saved)] == ["6", "7"]
    assert losses(folder) == {step: loss for step, loss in losses(whole).items() if step <= 7}

    # A process that is killed while it saves leaves the folder, without the marker and our list of files.
    for name in ("commit_success.txt", "files.json"):
        (saved / "7" / name).unlink()
    said = run(world, 1, in_bucket(world, bucket))
    assert f"{saved / '7'}: an unfinished save, removed" in said
    assert losses(folder) == losses(whole)
    for left, right in zip(parameters(folder), parameters(whole), strict=True):
        np.testing.assert_array_equal(left, right)

    # A torn one is skipped; two processes go on.
    data = saved / str(STEPS) / "state" / "_METADATA"
    data.write_bytes(data.read_bytes()[:-1])
    (folder / "result.json").unlink()
    said = run(world, 2, in_bucket(world, bucket, **{"mesh.cpu_devices": 1}))
    assert f"{saved / str(STEPS)}: damaged" in said and f"resuming from step {STEPS - 2}" in said
    moved, why = paths.children(folder / "checkpoints_damaged")
    assert (moved / "state").is_dir() and "_METADATA has" in why.read_text()
    for step, loss in losses(whole).items():
        np.testing.assert_allclose(losses(folder)[step], loss, rtol=1e-5)
    assert report.main([f"--workdir={folder}"]) == 0 and (folder / "report.html").exists()


@pytest.mark.slow
def test_annotations_in_a_new_bucket_folder(bucket):
    for new in (True, False):
        with AnnotationWriter(f"{bucket}/annotations") as writer:
            assert writer.write(ct_annotation("ct")) == new
    store = AnnotationStore(f"{bucket}/annotations")
    assert len(store) == 1 and store.get(*ct_annotation("ct").key) == ct_annotation("ct")
