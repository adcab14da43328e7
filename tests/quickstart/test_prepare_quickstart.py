"""`vilam3 prepare quickstart`: atomic output, counts of the records read back, errors of one line."""

import json

import pytest

from vilam3_jax import cli
from vilam3_jax.data.records import ExampleSource, ExampleWriter
from vilam3_jax.datasets.phantoms import make_phantoms
from vilam3_jax.errors import UserError
from vilam3_jax.quickstart import examples as quickstart
from vilam3_jax.quickstart import prepare as prepare_quickstart


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    make_phantoms(folder, seed=0, num=2)
    return folder


@pytest.fixture
def arguments(phantoms, tmp_path):
    return ["quickstart", "--source", str(phantoms), "--out", str(tmp_path / "out"), "--size", "smoke"]


def test_command_writes_counts_and_reuses(arguments, tmp_path, capsys):
    assert cli.main(["prepare", *arguments]) == 0
    text = capsys.readouterr().out
    out = tmp_path / "out"
    build = json.loads((out / "build.json").read_text())
    for row in build["counts"]:
        source = ExampleSource(out / row["dataset"], row["split"])
        assert len(source) == row["records"] > 0
        assert source.data_root.resolve() == out.resolve()
        assert any(
            line.split()[:3] == [row["dataset"], row["split"], str(row["records"])]
            for line in text.splitlines()
        )
    assert all(f"{count:6d}  {reason}" in text for reason, count in build["left_out"].items() if count)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    before = (out / "build.json").stat().st_mtime_ns
    assert cli.main(["prepare", *arguments]) == 0
    assert "reused" in capsys.readouterr().out and (out / "build.json").stat().st_mtime_ns == before


def test_another_build_is_not_overwritten(arguments, capsys):
    assert cli.main(["prepare", *arguments]) == 0
    assert cli.main(["prepare", *arguments, "--seed", "7"]) == 2
    assert "seed" in capsys.readouterr().err


def test_foreign_folder_is_refused_and_left_alone(arguments, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert cli.main(["prepare", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vilam3 prepare: error: ") and error.count("\n") == 1 and "not empty" in error
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_failure_leaves_nothing_behind(arguments, tmp_path, monkeypatch, capsys):
    written = []

    def full(self, example):
        written.append(example)
        if len(written) > 5:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(ExampleWriter, "write", full)
    assert cli.main(["prepare", *arguments]) == 2
    assert "No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "index", "label"])
def test_bad_samples_are_named(damage, tmp_path, capsys):
    source = tmp_path / "source"
    make_phantoms(source, seed=0, num=1)
    if damage == "missing":
        (source / "phantom_ct_000.nii.gz").unlink()
    elif damage == "index":
        (source / "samples.json").write_text("{")
    else:
        (source / "phantom_ct_000_labels.nii.gz").write_bytes(b"not a volume")
    code = cli.main(["prepare", "quickstart", "--source", str(source), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert code == 2 and ("phantom_ct_000" in error or "samples.json" in error)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_verify_finds_a_subject_on_both_sides(arguments, tmp_path):
    cli.main(["prepare", *arguments])
    out = tmp_path / "out"
    leaked = next(iter(ExampleSource(out / "pairs", "heldout")))
    train = list(ExampleSource(out / "pairs", "train"))
    for path in (out / "pairs" / "1.0.0").iterdir():
        path.unlink()
    for split, examples in (("train", [*train, leaked]), ("heldout", [leaked])):
        with ExampleWriter(out / "pairs" / "1.0.0", split, name="pairs", data_root="../..") as writer:
            for example in examples:
                writer.write(example)
    with pytest.raises(UserError, match="train and in heldout"):
        prepare_quickstart.verify(out)


def test_verify_finds_a_missing_image(arguments, tmp_path):
    cli.main(["prepare", *arguments])
    next((tmp_path / "out" / "images").iterdir()).unlink()
    with pytest.raises(UserError, match="is missing"):
        prepare_quickstart.verify(tmp_path / "out")


def test_sizes_grow():
    smoke, default, full = (quickstart.SIZES[k] for k in ("smoke", "default", "full"))
    for name in ("slices", "heldout_slices", "films", "reports"):
        assert getattr(smoke, name) < getattr(default, name) < getattr(full, name)
