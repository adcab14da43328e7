"""Calibrated probabilities and disagreements: fitted, cross-validated, and stored in records."""

import dataclasses
import hashlib
import json

import expert_helpers
import numpy as np
import pytest
from vilam3_experts import calibrate
from vilam3_experts.calibrate import Calibration, ClassCalibration, fit, load_calibration
from vilam3_experts.cli import main
from vilam3_experts.compare import Thresholds, compare, label_overlaps, with_disagreements
from vilam3_experts.truths import read_truths

from vilam3_jax.data.content_keys import image_key
from vilam3_jax.data.experts.record import Annotation, LabelMap, Segment, failed
from vilam3_jax.data.experts.store import AnnotationStore, AnnotationWriter
from vilam3_jax.data.images import load_pixels
from vilam3_jax.errors import UserError


def key_of(i):
    return hashlib.sha256(str(i).encode()).hexdigest()


def overconfident(count, temperature):
    """Probabilities sigmoid(T * z) for true probabilities sigmoid(z), and labels."""
    rng = np.random.default_rng(5)
    z = rng.normal(0, 1.5, count)
    true = rng.uniform(size=count) < 1 / (1 + np.exp(-z))
    return 1 / (1 + np.exp(-temperature * z)), true


def said(p, **fields):
    fields = {"version": "1", "weights_sha256": "w" * 64, **fields}
    return [
        Annotation(key_of(i), "FAKE", probabilities={"bright": float(v)}, **fields) for i, v in enumerate(p)
    ]


def test_temperature_is_found_again_and_held_out_loss_falls():
    p, y = overconfident(4000, 3.0)
    found, left_out = fit(said(p), [{"bright": bool(v)} for v in y], "temperature")
    one = found.classes["bright"]
    assert one.temperature == pytest.approx(3.0, rel=0.1) and not left_out
    assert one.log_loss[1] < one.log_loss[0] and one.ece[1] < 0.03 < one.ece[0]
    values = found.calibrated({"bright": 0.5, "other": 0.9})
    assert values == {"bright": pytest.approx(0.5)}  # the threshold and other classes are unchanged


def test_temperature_has_the_least_loss_of_all():
    p, y = overconfident(300, 0.4)
    best = calibrate.fit_temperature(p, y)
    for t in np.geomspace(0.1, 10, 60):
        other = ClassCalibration("temperature", float(t))
        assert calibrate.log_loss(best(p), y) <= calibrate.log_loss(other(p), y) + 1e-9


def test_isotonic_undoes_a_bias_that_no_temperature_can():
    p, draws = np.random.default_rng(7).uniform(0.01, 0.99, (2, 4000))
    y = draws < p**3
    truths = [{"bright": bool(v)} for v in y]
    isotonic = fit(said(p), truths, "isotonic")[0].classes["bright"]
    temperature = fit(said(p), truths, "temperature")[0].classes["bright"]
    assert isotonic.ece[1] < 0.03 < temperature.ece[1]
    grid = isotonic(np.linspace(0, 1, 500))
    assert (np.diff(grid) >= 0).all() and grid[0] > 0 and grid[-1] < 1
    np.testing.assert_allclose(isotonic(np.array([0.3, 0.6, 0.9])), [0.027, 0.216, 0.729], atol=0.08)


def test_figures_by_hand():
    p, y = np.array([0.9, 0.9, 0.2, 0.2]), np.array([True, False, False, False])
    assert calibrate.log_loss(p, y) == pytest.approx(-(np.log(0.9) + np.log(0.1) + 2 * np.log(0.8)) / 4)
    assert calibrate.ece(p, y) == pytest.approx(0.5 * 0.4 + 0.5 * 0.2)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.ones(60, bool), "60 positive and 0 negative samples, temperature needs 10 of each"),
        (np.arange(60) < 9, "9 positive and 51 negative"),
    ],
)
def test_too_few_samples_are_refused(y, message):
    with pytest.raises(UserError, match=message):
        fit(said(np.linspace(0.1, 0.9, 60)), [{"bright": bool(v)} for v in y], "temperature")


def test_what_does_not_help_is_left_out():
    p = np.linspace(0.05, 0.95, 40)
    y = np.tile([True, False], 20)
    records = [
        dataclasses.replace(a, probabilities={**a.probabilities, "sure": 0.9 if v else 0.1})
        for a, v in zip(said(p), y, strict=True)
    ]
    truths = [{"bright": bool(i % 3 == 0), "sure": bool(v)} for i, v in enumerate(y)]
    groups = ["one patient" if t["bright"] else str(i) for i, t in enumerate(truths)]
    found, left_out = fit(records, truths, "temperature", groups)
    assert set(found.classes) == {"sure"} and "one group" in left_out["bright"]


def test_versions_are_never_mixed(tmp_path):
    p, y = overconfident(1000, 3.0)
    truths = [{"bright": bool(v)} for v in y]
    other = said(p[:50]) + said(p, version="2")[50:]
    with pytest.raises(UserError, match=r"one version of one expert, .* FAKE 1.*; FAKE 2"):
        fit(other, truths, "temperature")
    found, _ = fit(said(p), truths, "temperature")
    found.save(tmp_path / "c.json")
    again = load_calibration(tmp_path / "c.json")
    assert again == found and again.name == found.name
    record = said([0.8])[0]
    told = again.apply(record)
    assert told.calibration == found.name and told.calibrated["bright"] < 0.8
    assert Annotation.from_bytes(told.to_bytes()) == told
    for wrong in ({"version": "2"}, {"weights_sha256": "v" * 64}):
        with pytest.raises(UserError, match=r"the calibration is of FAKE 1, weights w{12}, not of FAKE"):
            again.apply(dataclasses.replace(record, **wrong))


@pytest.mark.parametrize(
    "damage",
    [
        {"schema_version": 2},
        {"method": "magic"},
        {"classes": {"bright": 3}},
        {"classes": {"bright": {"method": "isotonic", "steps": [[0.5, 0.4], [0.4, 0.6]]}}},
        {"extra": 1},
    ],
)
def test_damaged_files_are_named(tmp_path, damage):
    good = Calibration("FAKE", "1", "", "temperature", {"bright": ClassCalibration("temperature", 2.0)})
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**json.loads(good.to_json()), **damage}))
    with pytest.raises(UserError, match=r"c\.json: "):
        load_calibration(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.csv", "key,bright\nabc,1\n", "line 2: 'abc' is not a content key"),
        ("l.csv", "input,bright\na.png,maybe\n", "line 2: bright is 'maybe'"),
        ("l.csv", "input,bright\na.png\n", "line 2: not the 2 columns of the header"),
        ("l.csv", "input,bright,bright\n", "two columns have the same name"),
        ("l.csv", "bright\n1\n", "either `key` or `input`"),
        ("l.csv", "input,bright\n", "has no labels"),
        ("l.csv", "input,bright\na,1\na,0\n", "line 3: 'a' appears twice"),
        ("l.jsonl", "{", "line 1: not JSON"),
        ("l.jsonl", "[]", "line 1: give an object"),
        ("l.jsonl", '{"input": "a", "labels": {"bright": 2}}', "bright is '2'"),
        ("l.csv", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_bad_labels_cost_one_line(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as error:
        read_truths(path)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_labels_of_both_forms(tmp_path):
    (tmp_path / "l.csv").write_text(f"key,group,a,b\n{key_of(1)},p,1,\n{key_of(2)},p,0,1\n")
    rows = [{"key": key_of(1), "group": "p", "labels": {"a": True}}, {"key": key_of(2), "labels": {"a": 0}}]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    one, two = read_truths(tmp_path / "l.csv")
    assert (one.labels, two.labels, one.group) == ({"a": True}, {"a": False, "b": True}, "p")
    assert [t.labels for t in read_truths(tmp_path / "l.jsonl")] == [{"a": True}, {"a": False}]


def test_commands_from_labels_to_calibrated_records(plugin, tmp_path, capsys):
    """Films listed in a table; the expert is overconfident."""
    films = tmp_path / "films"
    lines = ["input,bright"]
    p, y = overconfident(80, 3.0)
    records = []
    for i, (value, truth) in enumerate(zip(p, y, strict=True)):
        expert_helpers.write_png(films / f"{i}.png", i, size=(4, 4))
        key = image_key(load_pixels(films / f"{i}.png"))
        records.append(dataclasses.replace(said([value])[0], input_key=key))
        lines.append(f"{i}.png,{int(truth)}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    with AnnotationWriter(tmp_path / "store") as writer:
        for record in (*records, failed("f" * 64, "FAKE", "", "broken"), Annotation("k", "OTHER")):
            writer.write(record)
    fitting = ["calibrate", "--store", str(tmp_path / "store"), "--expert", "FAKE"]
    fitting += ["--labels", str(tmp_path / "labels.csv"), "--out", str(tmp_path / "c.json")]
    assert main(fitting) == 2
    assert "give their folder as --data" in capsys.readouterr().err
    assert main([*fitting, "--data", str(films)]) == 0
    out = capsys.readouterr().out
    assert "80 of 80 labelled inputs" in out and "bright  80  " in out
    applying = ["calibrate", "--store", str(tmp_path / "store"), "--calibration", str(tmp_path / "c.json")]
    assert main([*applying, "--out", str(tmp_path / "store")]) == 2
    assert main([*applying, "--out", str(tmp_path / "new")]) == 0
    assert "80 records calibrated, 2 copied" in capsys.readouterr().out
    assert main([*applying, "--out", str(tmp_path / "new")]) == 2  # existing records would not change
    assert "give a new folder as --out" in capsys.readouterr().err
    old, new = AnnotationStore(tmp_path / "store"), AnnotationStore(tmp_path / "new")
    assert sorted(new.keys()) == sorted(old.keys())
    name = load_calibration(tmp_path / "c.json").name
    for record in records:
        told = new.get(*record.key)
        assert told.calibration == name and set(told.calibrated) == {"bright"}
        assert dataclasses.replace(told, calibrated={}, calibration="") == record
    (tmp_path / "labels.csv").write_text("input,dark\n0.png,1\n")
    assert main([*fitting, "--data", str(films)]) == 2
    assert "has no class 'dark'; it has bright" in capsys.readouterr().err


def mapped(expert, labels, names, **fields):
    segments = tuple(
        Segment(i, n, int((labels == i).sum()), 1.0, 1, (0, 0, 0, 1, 1, 1))
        for i, n in names.items()
        if (labels == i).any()
    )
    return Annotation(
        key_of(0), expert, labels=LabelMap.encode(labels, np.eye(4)), segments=segments, version="v", **fields
    )


def test_overlap_of_labels_is_dice_by_name():
    one, two = np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)
    one[:2], two[1:3] = 1, 7  # half of each
    one[3, 0], two[3, 3] = 3, 3  # apart
    two[3, :2, 0] = 9
    a = mapped("VISTA3D", one, {1: "liver", 3: "spleen"}, args="everything")
    b = mapped("OTHER", two, {7: "Liver", 3: "spleen", 9: "aorta"})
    assert label_overlaps(a, b) == {"aorta": 0.0, "liver": pytest.approx(0.5), "spleen": 0.0}
    told = with_disagreements(a, [b], Thresholds(dice=0.4))
    assert [(d.expert, d.subject, d.measure, d.value) for d in told.disagreements] == [
        ("OTHER", "aorta", "dice", 0.0),
        ("OTHER", "spleen", "dice", 0.0),
    ]
    assert Annotation.from_bytes(told.to_bytes()) == told
    assert with_disagreements(told, [b], Thresholds(dice=0.4)) == told  # idempotent
    assert compare(a, mapped("OTHER", two[:3], {7: "liver"})) == []  # another grid


def test_command_compares_two_experts(tmp_path, capsys):
    first = [Annotation(key_of(i), "A", probabilities={"Lung_Opacity": 0.9}, version="1") for i in range(3)]
    second = [
        Annotation(key_of(i), "B", probabilities={"lung opacity": v}, version="2")
        for i, v in enumerate([0.85, 0.2])
    ]
    with AnnotationWriter(tmp_path / "store") as writer:
        for record in (*first, *second, failed(key_of(2), "B", "", "broken")):
            writer.write(record)
    command = ["compare", "--store", str(tmp_path / "store"), "--experts"]
    assert main([*command, "A,B", "--out", str(tmp_path / "new")]) == 0
    assert "1  lung opacity, probability difference" in capsys.readouterr().out
    new = AnnotationStore(tmp_path / "new")
    assert len(new) == 6 and new.get(key_of(0), "A").disagreements == ()
    (there,), (here,) = (new.get(key_of(1), e).disagreements for e in "AB")
    assert (there.expert, there.version, there.value) == ("B", "2", pytest.approx(0.7))
    assert (here.expert, here.version, here.value) == ("A", "1", pytest.approx(0.7))
    assert main([*command, "A,B", "--out", str(tmp_path / "new" / ".." / "store")]) == 2
    assert "give a new folder as --out" in capsys.readouterr().err
    for wrong, message in (("A", "give two names"), ("A,C", "no input has records of both")):
        assert main([*command, wrong]) == 2
        assert message in capsys.readouterr().err
