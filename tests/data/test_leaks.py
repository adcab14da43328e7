"""Tests of `vilam3 data leaks`: exact, scaled, compressed and cropped images, patients, texts."""

import functools
import io
import json

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from vilam3_jax.cli import main as cli
from vilam3_jax.data import leaks
from vilam3_jax.data.examples import Example, ImageRef, Turn
from vilam3_jax.data.leaks import fingerprints, report, texts
from vilam3_jax.data.leaks.main import main
from vilam3_jax.data.records import ExampleSource, ExampleWriter
from vilam3_jax.errors import UserError

SIDE, COARSE = 320, 80


@functools.cache
def film(number):
    """An image with shared anatomy and individual details, like films of one view."""
    anatomy, individual = np.random.default_rng(0), np.random.default_rng(1000 + number)
    shared = gaussian_filter(anatomy.normal(size=(COARSE, COARSE)), 10)
    details = np.zeros((COARSE, COARSE))
    for sigma in (1.5, 3, 6):
        details += gaussian_filter(individual.normal(size=(COARSE, COARSE)), sigma) * sigma
    mixed = shared / shared.std() + details / details.std()
    scaled = 255 * (mixed - mixed.min()) / (mixed.max() - mixed.min())
    return Image.fromarray(scaled.astype(np.uint8)).resize((SIDE, SIDE)).convert("RGB")


def encoded(image, kind="PNG", **more):
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def cropped(image, share):
    width, height = image.size
    left, top = int(share * width), int(share * height)
    return image.crop((left, top, width - left, height - top))


COPIES = {
    "half the size": lambda image: encoded(image.resize((SIDE // 2, SIDE // 2))),
    "another aspect": lambda image: encoded(image.resize((SIDE, SIDE // 2))),
    "compressed": lambda image: encoded(image, "JPEG", quality=40),
    "cropped by 3 %": lambda image: encoded(cropped(image, 0.03)),
    "cropped, scaled and compressed": lambda image: encoded(cropped(image, 0.05).resize((200, 200)), "JPEG"),
    "brighter": lambda image: encoded(image.point(lambda value: min(255, int(1.1 * value)))),
}


def record(name, data=None, question="Is there a made-up finding in it?", answer="yes", **meta):
    images = () if data is None else (ImageRef(data=data),)
    marker = "<image>\n" if images else ""
    turns = (Turn("user", marker + question), Turn("assistant", answer, True))
    return Example(name, "conversation", images, turns, meta={"dataset": "made", "split": "", **meta})


def dataset(folder, splits, name="made", **more):
    for split, records in splits.items():
        with ExampleWriter(folder, split, name=name, **more) as writer:
            for one in records:
                writer.write(one)
    return folder


def only_pair(result):
    (pair,) = result["pairs"]
    return pair


def test_clean_sets(tmp_path):
    folder = dataset(
        tmp_path / "made",
        {
            "train": [record(f"t{n}", encoded(film(n)), patient=f"p{n}") for n in range(20)],
            "test": [record(f"e{n}", encoded(film(n)), patient=f"p{n}") for n in range(20, 30)],
        },
    )
    result = leaks.find_leaks([folder])
    assert result["verdict"] == "clean" and only_pair(result)["leaked_records"] == 0
    assert set(only_pair(result)["kinds"]) <= {"text"}
    assert main([str(folder)]) == 0


@pytest.mark.parametrize("copied_is", ["training", "evaluation"])
@pytest.mark.parametrize("name", COPIES)
def test_near_copies_are_found(tmp_path, name, copied_is):
    copy, whole = COPIES[name](film(3)), encoded(film(3))
    if copied_is == "evaluation":
        copy, whole = whole, copy
    folder = dataset(
        tmp_path / "made",
        {
            "train": [record(f"t{n}", copy if n == 3 else encoded(film(n))) for n in range(6)],
            "test": [record("e3", whole), record("e9", encoded(film(9)))],
        },
    )
    pair = only_pair(leaks.find_leaks([folder]))
    assert pair["leaked_records"] == 1
    found = pair["kinds"]["near_image"]
    assert [(one["training"], one["evaluation"]) for one in found["pairs"]] == [("t3", "e3")]
    assert 0 <= found["pairs"][0]["distance"] <= fingerprints.NEAR_DISTANCE


def test_same_pixels_in_other_files(tmp_path):
    folder = dataset(
        tmp_path / "made",
        {
            "train": [record("t", encoded(film(1), "PNG"))],
            "test": [record("same", encoded(film(1), "BMP")), record("other", encoded(film(2)))],
        },
    )
    pair = only_pair(leaks.find_leaks([folder]))
    assert pair["kinds"]["image"]["evaluation_ids"] == ["same"]
    assert "near_image" not in pair["kinds"]


def test_images_named_by_path_and_slices_of_one_volume(tmp_path):
    import nibabel

    folder = tmp_path / "made"
    folder.mkdir()
    film(1).save(folder / "a.png")
    voxels = np.random.default_rng(0).integers(0, 200, (12, 12, 12)).astype(np.int16)
    nibabel.Nifti1Image(voxels, np.eye(4)).to_filename(folder / "v.nii.gz")
    nibabel.Nifti1Image(voxels[::-1].copy(), np.eye(4)).to_filename(folder / "w.nii.gz")

    def of(name, **image):
        ref = ImageRef(**image)
        return Example(
            name, "conversation", (ref,), (Turn("user", "<image>\nSeen?"), Turn("assistant", "a", True))
        )

    dataset(
        folder,
        {
            "train": [of("t1", path="a.png"), of("t2", path="v.nii.gz", axis=2, index=3, modality="MR")],
            "test": [
                of("same file", path="a.png"),
                of("other slice", path="v.nii.gz", axis=2, index=9, modality="MR"),
                of("other volume", path="w.nii.gz", axis=2, index=9, modality="MR"),
            ],
        },
    )
    pair = only_pair(leaks.find_leaks([folder]))
    assert pair["kinds"]["image"]["evaluation_ids"] == ["same file"]
    assert pair["kinds"]["volume"]["evaluation_ids"] == ["other slice"]


def test_patients_and_groups(tmp_path):
    train = [record(f"t{n}", encoded(film(n)), patient=f"key{n}", group=f"g{n}") for n in range(3)]
    test = [
        record("e1", encoded(film(10)), patient="key1"),
        record("e2", encoded(film(11)), group="g2"),
        record("e3", encoded(film(12)), patient="new"),
    ]
    one = dataset(tmp_path / "one", {"train": train}, "one")
    two = dataset(tmp_path / "two", {"test": test}, "two")
    result = leaks.find_leaks([one, two])
    pair = only_pair(result)
    assert (pair["training"], pair["evaluation"]) == ("one/train", "two/test")
    assert pair["kinds"]["patient"]["evaluation_ids"] == ["e1"]
    assert pair["kinds"]["patient"]["training_ids"] == ["t1"]
    assert pair["kinds"]["group"]["evaluation_ids"] == ["e2"]
    assert pair["leaked_records"] == 2 and result["verdict"] == "leaks"
    assert [row["without_patient"] for row in result["sets"]] == [0, 1]
    assert "key1" not in json.dumps(result)


QUESTION = (
    "A made-up patient of invented age comes with imaginary pain of the left elbow since {} weeks; which?"
)


def test_words_of_records_without_images(tmp_path):
    train = [record(f"t{n}", question=QUESTION.format(f"word{n}"), answer=f"option {n}") for n in range(5)]
    copied = "  " + QUESTION.format("word3").upper().replace(";", " -")
    other = "What else is imagined here by nobody at all in this place?"
    test = [record("copied", question=copied, answer="OPTION 3!"), record("new", question=other)]
    pair = only_pair(leaks.find_leaks([dataset(tmp_path / "made", {"train": train, "test": test})]))
    assert pair["kinds"]["text"]["evaluation_ids"] == ["copied"] and pair["leaked_records"] == 1
    assert pair["kinds"]["text"]["pairs"][0]["training"] == "t3"


def test_words_about_other_images_are_no_leak(tmp_path):
    folder = dataset(
        tmp_path / "made",
        {
            "train": [record("t", encoded(film(1)), question="Is there a made-up mass at all?")],
            "test": [record("e", encoded(film(2)), question="is there a made-up mass at all")],
        },
    )
    result = leaks.find_leaks([folder])
    assert only_pair(result)["kinds"]["text"]["evaluation_records"] == 1
    assert only_pair(result)["leaked_records"] == 0 and result["verdict"] == "clean"


def test_phrases_of_the_genre_do_not_count(tmp_path):
    question = "Which of these made-up organs is it?"
    train = [record(f"t{n}", question=question) for n in range(30)]
    test = [record("e", question=question)]
    result = leaks.find_leaks([dataset(tmp_path / "made", {"train": train, "test": test})])
    assert result["verdict"] == "clean"


def test_unreadable_images_are_counted(tmp_path):
    folder = dataset(
        tmp_path / "made",
        {
            "train": [record("t", b"no image"), record("u", encoded(film(1)))],
            "test": [record("e", encoded(film(2)))],
        },
    )
    result = leaks.find_leaks([folder])
    assert [row["unreadable_images"] for row in result["sets"] if row["role"] == "training"] == [1]
    assert "1 unreadable images" in report.to_text(result)


def test_blank_images_are_alike_only_if_equal(tmp_path):
    blank = [Image.new("RGB", (64, 64), (level, level, level)) for level in (0, 10)]
    folder = dataset(
        tmp_path / "made",
        {
            "train": [record("t", encoded(blank[0]))],
            "test": [record("other", encoded(blank[1])), record("same", encoded(blank[0]))],
        },
    )
    pair = only_pair(leaks.find_leaks([folder]))
    assert pair["kinds"]["image"]["evaluation_ids"] == ["same"] and "near_image" not in pair["kinds"]


def test_stated_reasons_do_not_fail(tmp_path):
    shared = [record("r", encoded(film(1)))]
    folder = dataset(
        tmp_path / "made",
        {"train": shared, "test": shared},
        provenance={"shared_images": "the official split divides questions"},
    )
    result = leaks.find_leaks([folder])
    assert only_pair(result)["leaked_records"] == 1 and result["verdict"] == "clean"
    assert "the official split divides questions" in report.to_text(result)


def test_command(tmp_path, capsys):
    dataset(tmp_path / "one", {"train": [record("t", encoded(film(1)))]}, "one")
    dataset(tmp_path / "two", {"test": [record("e", encoded(film(1)))], "train": [record("u")]}, "two")
    (tmp_path / "media").mkdir()
    assert cli(["data", "leaks", str(tmp_path)]) == 2
    out = capsys.readouterr().out
    assert "one/train -> two/test: 1 of 1 leaked" in out and "verdict: leaks" in out
    result = json.loads((tmp_path / "leaks.json").read_text())
    assert [(pair["training"], pair["leaked_records"]) for pair in result["pairs"]] == [
        ("one/train", 1),
        ("two/train", 0),
    ]
    assert str(tmp_path) not in json.dumps(result)
    other = tmp_path / "elsewhere.json"
    assert main([str(tmp_path / "two"), str(tmp_path / "one"), "--json", str(other)]) == 2
    assert other.exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["missing"], r"no dataset \(dataset_info"),
        (["one"], "no evaluation set among one/train"),
        (["one", "--training", "test"], "no training set among"),
        (["one", "one"], "--json FILE"),
        (["one", "--distance", "300"], "--distance must be"),
    ],
)
def test_bad_input(tmp_path, argv, message, monkeypatch):
    dataset(tmp_path / "one", {"train": [record("t")]}, "one")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main(argv)


def test_provenance_of_a_run(tmp_path):
    dataset(tmp_path / "one", {"train": [record("t", encoded(film(1)))]}, "one")
    dataset(tmp_path / "two", {"test": [record("e", encoded(film(1)))]}, "two")
    sources = [ExampleSource(tmp_path / "one", "train")]
    assert leaks.provenance(tmp_path, sources) is None
    main([str(tmp_path)])
    kept = leaks.provenance(tmp_path, sources)
    assert kept and kept["verdict"] == "leaks" and kept["not_covered"] == []
    assert kept["pairs"][0]["kinds"] == {"image": 1, "text": 1}
    assert "evaluation_ids" not in json.dumps(kept)
    dataset(tmp_path / "three", {"train": [record("new")]}, "three")
    kept = leaks.provenance(tmp_path, [ExampleSource(tmp_path / "three", "train")])
    assert kept and (kept["verdict"], kept["not_covered"]) == ("incomplete", ["three/train"])
    (tmp_path / "leaks.json").write_text("{}")
    with pytest.raises(UserError, match=r"leaks\.json: not a report of `vilam3 data leaks`"):
        leaks.provenance(tmp_path, sources)


# --- the search


def random_fingerprints(count, seed):
    rng = np.random.default_rng(seed)
    variants = len(fingerprints.MARGINS)
    coarse = rng.integers(0, 1 << 63, (count, variants), dtype=np.uint64)
    fine = rng.integers(0, 1 << 63, (count, variants, 4), dtype=np.uint64)
    return [fingerprints.Fingerprint(str(n), coarse[n], fine[n]) for n in range(count)]


def flipped(hashes, bits, rng):
    changed = hashes.copy()
    for bit in rng.choice(63, bits, replace=False):
        changed.flat[0] ^= np.uint64(1) << np.uint64(bit)
    return changed


@pytest.mark.parametrize("bits", range(8))
def test_search_finds_all_up_to_seven_bits(bits):
    rng = np.random.default_rng(bits)
    known = random_fingerprints(300, 1)
    queries = [
        fingerprints.Fingerprint(
            image.key, np.array([flipped(image.coarse[:1], bits, rng)[0], *random.coarse[1:]]), image.fine
        )
        for image, random in zip(known, random_fingerprints(300, 2), strict=True)
    ]
    found = fingerprints.NearIndex(known).near(queries, 10)
    assert found == {(n, n): 0 for n in range(300)}


def test_search_bounds_its_memory(monkeypatch):
    monkeypatch.setattr(fingerprints, "_MAX_CANDIDATES", 50)
    known = random_fingerprints(40, 3)
    same = [fingerprints.Fingerprint(image.key, known[0].coarse, known[0].fine) for image in known]
    found = fingerprints.NearIndex(same).near(same, 0)
    assert len(found) == 40 * 40


def test_runs_of_words():
    words = [f"w{n}" for n in range(20)]
    assert len(texts.run_hashes(" ".join(words))) == 20 - texts.RUN + 1
    assert len(texts.run_hashes(" ".join(words[:5]))) == 1
    assert len(texts.run_hashes("too few words"[:7])) == 0
    same = texts.run_hashes("One, TWO; three (four)")
    assert same == texts.run_hashes("one two three four") != texts.run_hashes("two one three four")
