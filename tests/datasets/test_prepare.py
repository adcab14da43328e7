"""Dataset builds: parallel, resumable, atomic, readable by TFDS; and the command."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from typing import ClassVar

import numpy as np
import pytest
from toy_dataset import Toy
from twins import picture, write

from vilam3_jax import cli
from vilam3_jax.data import decoded_images, leaks, stream, tfds_folder
from vilam3_jax.data.content_keys import image_key
from vilam3_jax.data.images import decode_image, decode_scaled
from vilam3_jax.data.records import ExampleSource
from vilam3_jax.datasets import builder, registry, shard_jobs
from vilam3_jax.datasets import prepare as command
from vilam3_jax.datasets.builder import BuildOptions, prepare
from vilam3_jax.errors import UnavailableError, UserError

TRAIN, TEST = 9, 3


def rows():
    return [
        {
            "id": f"r{number}",
            "split": "train" if number < TRAIN else "test",
            "image": f"images/{number}.jpg",
            "question": f"What is {number}?",
            "answer": str(number),
            "patient": f"Jane{number}",
        }
        for number in range(TRAIN + TEST)
    ]


def twin(folder, changed=None):
    listed = rows()
    for number, values in (changed or {}).items():
        listed[number] |= values
    pictures = {f"images/{number}.jpg": picture(number) for number in range(TRAIN + TEST)}
    return write(folder, {"rows.json": listed, **pictures})


@pytest.fixture
def source(tmp_path):
    return twin(tmp_path / "source")


def shard_times(out):
    return {path.name: path.stat().st_mtime_ns for path in (out / "toy" / ".1.2.0.work").glob("*[0-9]")}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_build_is_a_tfds_dataset(source, tmp_path, processes):
    import tensorflow_datasets as tfds

    built = prepare(Toy(), source, tmp_path / "out", BuildOptions(processes=processes))
    assert built.folder == tmp_path / "out" / "toy" / "1.2.0" and not built.reused
    train = ExampleSource(tmp_path / "out" / "toy", "train")
    assert [example.id for example in train] == [f"r{number}" for number in range(TRAIN)]
    assert [example.images[0].data for example in train] == [picture(number) for number in range(TRAIN)]
    assert train[3].meta["input_key"] == image_key(decode_image(picture(3)))
    assert len(train.info["splits"]["train"]["shards"]) == 5
    assert not any("Jane" in path.read_bytes().decode("latin1") for path in built.folder.iterdir())
    theirs = tfds.data_source("toy", data_dir=tmp_path / "out", split="train")
    assert [one["turns"]["text"][1].decode() for one in theirs] == [str(number) for number in range(TRAIN)]
    info = tfds.builder_from_directory(built.folder).info
    assert info.splits["test"].num_examples == TEST and info.description == "A toy."
    assert {path.name for path in (tmp_path / "out" / "toy").iterdir()} == {"1.2.0"}


def test_tfds_front_door(source, tmp_path):
    import tensorflow_datasets as tfds

    made = builder.tfds_builder(Toy(), tmp_path / "out")
    config = tfds.download.DownloadConfig(manual_dir=source)
    made.download_and_prepare(download_dir=tmp_path / "unused", download_config=config)
    assert len(made.as_data_source("train")) == TRAIN
    assert Toy.instructions == made.MANUAL_DOWNLOAD_INSTRUCTIONS
    assert len(ExampleSource(tmp_path / "out" / "toy", "test")) == TEST


def test_an_interrupted_build_goes_on(source, tmp_path, monkeypatch):
    whole = prepare(Toy(), source, tmp_path / "whole")
    out, build = tmp_path / "out", shard_jobs.build
    started = []

    def failing(job):
        started.append(job)
        if len(started) == 4:
            raise OSError(28, "No space left on device")
        return build(job)

    monkeypatch.setattr(shard_jobs, "build", failing)
    with pytest.raises(UserError, match="No space left"):
        prepare(Toy(), source, out)
    assert not (out / "toy" / "1.2.0").exists()
    before = shard_times(out)
    assert len(before) == 3
    # A damaged shard and one with a changed image are rebuilt; the intact one is kept.
    work = out / "toy" / ".1.2.0.work"
    (work / "train-00000").write_bytes(b"damaged")
    (source / "images/2.jpg").write_bytes(picture(77))
    monkeypatch.setattr(shard_jobs, "build", lambda job: started.append(job) or build(job))
    del started[:]
    prepare(Toy(), source, out)
    assert [job.target.rsplit("/", 1)[1] for job in started] == [
        "train-00000", "train-00001", "train-00003", "train-00004", "test-00000", "test-00001",
    ]  # fmt: skip
    train = ExampleSource(out / "toy", "train")
    assert train[2].images[0].data == picture(77) and train[5].images[0].data == picture(5)
    assert not work.exists()
    (source / "images/2.jpg").write_bytes(picture(2))
    shutil.rmtree(out)
    again = prepare(Toy(), source, out)
    files = {shard["file"]: shard["sha256"] for shard in again.info["splits"]["train"]["shards"]}
    assert files == {shard["file"]: shard["sha256"] for shard in whole.info["splits"]["train"]["shards"]}


def test_a_killed_process_is_no_lost_build(tmp_path, monkeypatch):
    source = twin(tmp_path / "source", {6: {"kill": "now"}})
    monkeypatch.setenv("TOY_KILL", "now")
    with pytest.raises(UnavailableError, match="finished shards are kept"):
        prepare(Toy(), source, tmp_path / "out", BuildOptions(processes=2))
    monkeypatch.delenv("TOY_KILL")
    built = prepare(Toy(), source, tmp_path / "out")
    assert built.info["splits"]["train"]["records"] == TRAIN


class Variants(Toy):
    configs: ClassVar = {"en": "English", "zh": "Chinese"}


def test_variants_are_datasets_of_their_own(source, tmp_path):
    out = tmp_path / "out"
    prepare(Variants(config="en"), source, out)
    assert ExampleSource(out / "toy", "train").name == "toy/en"
    prepare(Variants(config="zh"), source, out)
    with pytest.raises(UserError, match="several variants; choose one of toy/en, toy/zh"):
        ExampleSource(out / "toy", "train")
    assert tfds_folder.datasets_in(out) == [out / "toy" / "en", out / "toy" / "zh"]
    sets = leaks.find_leaks([out])["sets"]
    assert {row["name"] for row in sets} >= {"toy/en/train", "toy/zh/test"}
    with pytest.raises(UserError, match=r"no dataset 'toi' in .*, which has toy/en, toy/zh"):
        stream.open_sources(out, (("toi", 1.0),), "train")


def test_two_processes_do_not_build_the_same_at_once(source, tmp_path):
    folder = tmp_path / "out" / "toy"
    work = folder / ".1.2.0.work"
    (folder / "incomplete.K1LL3D_1.2.0").mkdir(parents=True)  # left by TFDS when a build was killed
    work.mkdir()
    other = os.open(work, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(UserError, match=r"toy/1\.2\.0: another process builds it"):
        prepare(Toy(), source, tmp_path / "out")
    os.close(other)
    prepare(Toy(), source, tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {"1.2.0"}


KILLED = """
import concurrent.futures, multiprocessing, os
from vilam3_jax.datasets.builder import _begin_worker
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(1, context, _begin_worker)
    print(pool.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), 9)
"""


def test_a_killed_build_leaves_no_worker(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    # The worker inherits the pipe, so this returns when both have ended.
    ended = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, timeout=120)
    assert ended.returncode == -9 and ended.stdout


def test_a_source_that_vanishes_ends_the_build(source, tmp_path, monkeypatch):
    finished = shard_jobs.build

    def vanishing(job):
        if job.target.endswith("train-00002"):
            source.rename(tmp_path / "elsewhere")
        return finished(job)

    monkeypatch.setattr(shard_jobs, "build", vanishing)
    with pytest.raises(UnavailableError, match=r"source: the source folder is gone"):
        prepare(Toy(), source, tmp_path / "out")
    assert len(shard_times(tmp_path / "out")) == 2


def test_what_cannot_be_used_is_named_and_the_rest_is_built(tmp_path):
    faults = {
        0: {"question": ["a list"]},
        1: {"answer": None},
        2: {"image": "../../secret.jpg"},
        3: {"image": 7},
        4: {"id": "r5"},
        10: {"id": "r6"},
    }
    source = twin(tmp_path / "source", faults)
    (source / "images/7.jpg").unlink()
    (source / "images/8.jpg").write_bytes(picture(8)[:100])
    built = prepare(Toy(), source, tmp_path / "out")
    train, test = (built.info["splits"][name] for name in ("train", "test"))
    # r5 of row 4 is kept, r5 of row 5 is a duplicate.
    assert [e.id for e in ExampleSource(built.folder, "train")] == ["r5", "r6"]
    assert [e.id for e in ExampleSource(built.folder, "test")] == ["r9", "r11"]
    assert train["skipped"]["total"] == 7 and test["skipped"]["first"] == [
        ["r6", "another record has this id"]
    ]
    named = dict(train["skipped"]["first"])
    assert "not a text" in named["rows.json row 0"] and "missing" in named["rows.json row 1"]
    assert "leaves the data root" in named["rows.json row 2"] and "cut short" in named["r8"]
    assert "Jane" not in json.dumps(built.info)


def test_a_split_without_records_is_told(tmp_path):
    source = twin(tmp_path / "source", {number: {"answer": None} for number in range(TRAIN)})
    built = prepare(Toy(), source, tmp_path / "out")
    assert set(built.info["splits"]) == {"test"}
    assert built.info["empty_splits"]["train"]["skipped"]["total"] == TRAIN
    assert built.warnings == ("split train is omitted, because none of its 9 items gives a record",)
    assert ["train", "9", "0", "9", "0", "0"] in [
        line.split() for line in command.summary(built.info).split("\n")
    ]


def test_an_image_that_is_named_by_path_is_set_aside_without_it(tmp_path):
    source = twin(tmp_path / "source")
    (source / "images/2.jpg").write_text("<html>")
    built = prepare(Toy(), source, tmp_path / "out", BuildOptions(copy_images=False))
    (named,) = built.info["splits"]["train"]["skipped"]["first"]
    assert named[0] == "r2" and named[1].startswith("web page")


def test_a_disk_that_fails_while_images_are_read_ends_the_build(source, tmp_path, monkeypatch):
    def failing(path):
        raise UnavailableError(f"{path}: cannot be read now")

    monkeypatch.setattr(shard_jobs, "load_pixels", failing)
    with pytest.raises(UnavailableError, match="cannot be read now"):
        prepare(Toy(), source, tmp_path / "out", BuildOptions(copy_images=False))


def test_nothing_usable_is_refused(tmp_path):
    source = twin(tmp_path / "source", {number: {"answer": None} for number in range(TRAIN + TEST)})
    with pytest.raises(UserError, match=r"no usable record in it; rows\.json row 0: the answer is missing"):
        prepare(Toy(), source, tmp_path / "out")
    write(source, {"rows.json": []})
    with pytest.raises(UserError, match="holds no record of toy"):
        prepare(Toy(), source, tmp_path / "out")
    (source / "rows.json").unlink()
    with pytest.raises(UserError, match=r"rows\.json missing\. Write rows\.json"):
        prepare(Toy(), source, tmp_path / "out")


def test_what_splits_share_is_told_listed_and_refused_if_strict(tmp_path):
    source = twin(tmp_path / "source", {9: {"patient": "Jane1"}, 10: {"image": "images/2.jpg"}})
    built = prepare(Toy(), source, tmp_path / "out")
    assert built.warnings == ("train and test share 1 patients or groups and 1 images",)
    assert built.info["shared"]["train and test"]["records"] == [["r1", "r9"], ["r2", "r10"]]
    with pytest.raises(UserError, match="share 1 patients and 1 images"):
        prepare(Toy(), source, tmp_path / "strict", BuildOptions(strict=True))


def test_other_counts_than_the_official_ones_are_told(source, tmp_path):
    toy = Toy()
    toy.expected = TRAIN
    built = prepare(toy, source, tmp_path / "out")
    assert built.warnings == ("split test has 3 items, the official release 9; is the download complete?",)
    with pytest.raises(UserError, match="the official release 9"):
        prepare(toy, source, tmp_path / "strict", BuildOptions(strict=True))


def test_a_complete_build_is_reused_and_no_other_is_overwritten(source, tmp_path):
    prepare(Toy(), source, tmp_path / "out")
    assert prepare(Toy(), source, tmp_path / "out").reused
    with pytest.raises(UserError, match="other files or options"):
        prepare(Toy(), source, tmp_path / "out", BuildOptions(seed=3))
    (tmp_path / "mine/toy/1.2.0").mkdir(parents=True)
    (tmp_path / "mine/toy/1.2.0/thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        prepare(Toy(), source, tmp_path / "mine")
    assert (tmp_path / "mine/toy/1.2.0/thesis.txt").read_text() == "mine"


def test_images_by_path_are_found_again(source, tmp_path):
    prepare(Toy(), source, tmp_path / "out", BuildOptions(copy_images=False))
    train = ExampleSource(tmp_path / "out" / "toy", "train")
    image = train[4].images[0]
    assert image.data is None and (train.data_root / str(image.path)).read_bytes() == picture(4)


def test_images_are_stored_decoded(source, tmp_path, registered, capsys):
    arguments = [
        "prepare",
        "toy",
        "--source",
        str(source),
        "--out",
        str(tmp_path / "out"),
        "--processes",
        "1",
    ]
    assert cli.main([*arguments, "--decode-images", "12"]) == 0
    assert "images decoded at 12 pixels" in capsys.readouterr().out
    train = ExampleSource(tmp_path / "out" / "toy", "train")
    for number in range(TRAIN):
        data = train[number].images[0].data
        assert decoded_images.is_decoded(data)
        np.testing.assert_array_equal(decode_image(data), decode_scaled(picture(number), 12))
        assert train[number].meta["input_key"] == image_key(decode_image(picture(number)))


def test_into_a_bucket(bucket, source, tmp_path):
    built = prepare(Toy(), source, "gs://bucket/data")
    assert [e.id for e in ExampleSource("gs://bucket/data/toy", "test")] == ["r9", "r10", "r11"]
    assert built.info["data_root"] == str(source)
    assert prepare(Toy(), source, "gs://bucket/data").reused
    assert sorted(path.name for path in (bucket / "data/toy/1.2.0").iterdir())[0] == "LICENSE"


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(registry, "get", lambda name: Toy if name == "toy" else registry_get(name))


registry_get = registry.get


def test_the_command(source, tmp_path, registered, capsys):
    out = str(tmp_path / "out")
    arguments = ["prepare", "toy", "--source", str(source), "--out", out, "--processes", "1"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "train  9      9        0        9       9" in text and "written and verified" in text
    assert f"vilam3 data show --data={out} --dataset=toy" in text
    assert cli.main(["data", "show", f"--data={out}", "--dataset=toy", "--index=4"]) == 0
    assert "What is 4?" in capsys.readouterr().out
    assert cli.main(arguments) == 0
    assert "reused" in capsys.readouterr().out
    assert cli.main([*arguments[:-1], "0"]) == 2


def test_the_hints_name_the_variant(source, tmp_path, monkeypatch, capsys):
    """The commands printed for one variant still work when there is a second."""
    monkeypatch.setattr(registry, "get", lambda name: Variants)
    out = str(tmp_path / "out")
    arguments = ["prepare", "toy", "--source", str(source), "--out", out, "--processes", "1"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "--dataset=toy/en" in text and "(('toy/en', 1.0),)" in text
    assert cli.main([*arguments, "--variant", "zh"]) == 0
    assert "--dataset=toy/zh" in capsys.readouterr().out
    assert cli.main(["data", "show", f"--data={out}", "--dataset=toy/en", "--index=4"]) == 0


def test_unknown_names_and_missing_folders_are_one_sentence(tmp_path, capsys):
    assert cli.main(["prepare", "chexpret", "--source", "x", "--out", "y"]) == 2
    assert "no dataset 'chexpret'; there are: " in capsys.readouterr().err
    assert cli.main(["prepare", "slake", "--source", str(tmp_path / "no"), "--out", "y"]) == 2
    error = capsys.readouterr().err
    assert "no such folder" in error and error.count("\n") == 1


def test_credentialed_data_stays_on_the_machine(tmp_path, capsys):
    arguments = ["prepare", "mimic_cxr_class", "--source", str(tmp_path), "--out", "gs://bucket/data"]
    assert cli.main(arguments) == 2
    assert "stays on this machine" in capsys.readouterr().err


def test_the_list_and_the_help_name_every_dataset(capsys):
    assert cli.main(["prepare", "--list"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("quickstart", *registry.names()))
    with pytest.raises(SystemExit):
        cli.main(["prepare", "slake", "--help"])
    assert "what to download" in capsys.readouterr().out
