"""Phantoms: the same bytes for the same seed, consistent labels, readable like real samples."""

from __future__ import annotations

import numpy as np
import pytest

from vilam3_jax.cli import guarded
from vilam3_jax.data.images import load_pixels
from vilam3_jax.data.volumes import load_label_map, load_volume
from vilam3_jax.datasets.phantoms import main, make_phantoms
from vilam3_jax.datasets.samples import read_samples
from vilam3_jax.errors import UserError

NUM = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantoms")
    paths = make_phantoms(out, seed=7, num=NUM)
    assert set(paths) == {s.name for s in read_samples(out)}
    return out


def by_kind(folder, kind):
    return [s for s in read_samples(folder) if s.kind == kind]


def test_variety(folder):
    samples = read_samples(folder)
    assert {(s.kind, s.modality): 0 for s in samples} == {
        ("ct", "CT"): 0, ("mr", "MRI"): 0, ("film", "X-ray"): 0, ("film", "brain MRI slice"): 0,
    }  # fmt: skip
    assert len(samples) == 6 * NUM
    assert {s.class_name for s in samples if s.modality == "X-ray"} == {"normal", "pneumonia"}
    brain = {s.class_name for s in samples if s.modality == "brain MRI slice"}
    assert brain == {"no tumor", "glioma", "meningioma", "pituitary"}
    assert {s.body_region for s in samples} == {"abdomen", "chest", "head"}
    films = [s for s in samples if s.modality == "X-ray"]
    assert len({s.split_group for s in films}) == NUM, "two films of one patient share a group"
    assert len({load_volume(s.path).content_key for s in samples if s.kind != "film"}) == 2 * NUM


def test_bodies_have_organs_where_they_belong(folder):
    present_counts = set()
    for sample in by_kind(folder, "ct"):
        volume = load_volume(sample.path)
        assert max(volume.voxels.shape) <= 64
        assert sample.window == (50.0, 400.0)
        labels = load_label_map(sample.label_map, volume)
        present = {sample.label_names[i]: i for i in np.unique(labels) if i}
        present_counts.add(len(present))
        assert 4 <= len(present) <= 6
        right = {name: np.nonzero(labels == i)[0].mean() / labels.shape[0] for name, i in present.items()}
        front = {name: np.nonzero(labels == i)[1].mean() / labels.shape[1] for name, i in present.items()}
        for name, on_right in {
            "liver": True,
            "right kidney": True,
            "left kidney": False,
            "spleen": False,
        }.items():
            if name in right:  # RAS: a high first index is the patient's right
                assert (right[name] > 0.5) == on_right
        assert all(front[name] < 0.45 for name in front if "kidney" in name)
        if "liver" in present:
            assert 40 < volume.voxels[labels == present["liver"]].mean() < 85
        assert volume.voxels.min() < -900 and volume.voxels.max() > 300
    assert len(present_counts) > 1, "absent organs are needed for questions with the answer no"


def test_every_second_head_has_a_tumour(folder):
    heads = by_kind(folder, "mr")
    for index, sample in enumerate(heads):
        volume = load_volume(sample.path)
        labels = load_label_map(sample.label_map, volume)
        assert sample.label_names == {1: "brain", 2: "brain tumor"}
        assert (np.unique(labels).max() == 2) == bool(index % 2)
        if index % 2:
            assert volume.voxels[labels == 2].mean() > 1.3 * volume.voxels[labels == 1].mean()


def test_sick_films_look_sick(folder):
    films = [s for s in by_kind(folder, "film") if s.modality == "X-ray"]
    means = {"normal": [], "pneumonia": []}
    for sample in films:
        film = load_pixels(sample.path)
        assert film.shape == (192, 192, 3)
        means[sample.class_name].append(film[60:150, 20:172].mean())
    assert min(means["pneumonia"]) > max(means["normal"])


def test_same_seed_same_bytes_and_num_only_adds(folder, tmp_path):
    again, other = make_phantoms(tmp_path / "a", seed=7, num=2), make_phantoms(tmp_path / "b", seed=8, num=1)
    for name, path in again.items():
        assert path.read_bytes() == (folder / path.name).read_bytes(), name
    for name, path in other.items():
        assert path.read_bytes() != again[name].read_bytes()


def test_command_line(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "p"), "--num", "1"]) == 0
    assert len(read_samples(tmp_path / "p")) == 6
    assert guarded("phantoms", main, ["--out", str(tmp_path / "q"), "--num", "0"]) == 2
    assert "error: num is 0" in capsys.readouterr().err
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        make_phantoms(tmp_path / "file", num=1)
