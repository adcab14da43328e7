"""Writes a small fake quickstart folder: arbitrary figures in the file formats of a real run."""

from __future__ import annotations

import json
import math
import random

import nibabel as nib
import numpy as np

from vilam3_jax.data.content_keys import image_key
from vilam3_jax.data.examples import Example, ImageRef, Turn
from vilam3_jax.data.experts.exchange import Result, exchange
from vilam3_jax.data.experts.record import Annotation, LabelMap, Segment
from vilam3_jax.data.experts.store import AnnotationWriter
from vilam3_jax.data.experts.wording import Plane
from vilam3_jax.data.images import encode_png
from vilam3_jax.data.records import ExampleWriter
from vilam3_jax.data.volumes import load_volume
from vilam3_jax.report.runs import ARMS, FURTHER_ARMS, STAGES

ORGANS = {1: "liver", 3: "spleen", 6: "aorta", 11: "bladder"}
EXPERTS = {"stage4_experts": "on", "stage4_falsified": "falsified"}
IMAGES = {"stage4_blank": "blank"}
SHARE = dict(zip(ARMS + FURTHER_ARMS, (0.85, 0.55, 0.3, 0.4, 0.45, 0.5), strict=True))


def phantom(seed, side=40):
    """(voxels float32, labels uint8) of an ellipsoid body with organs."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, side)] * 3, indexing="ij"))
    rng = np.random.default_rng(seed)
    voxels = np.where((grid**2).sum(0) < 0.9, 40.0, -900.0).astype(np.float32)
    labels = np.zeros(voxels.shape, np.uint8)
    centres = ((0.4, 0.1, 0.1, 0.4, 1), (-0.5, 0.0, 0.1, 0.22, 3), (0.0, -0.4, 0.0, 0.13, 6))
    for x, y, z, radius, label in centres:
        centre = np.array([x, y, z]).reshape(3, 1, 1, 1) + rng.normal(0, 0.04, (3, 1, 1, 1))
        inside = ((grid - centre) ** 2).sum(0) < radius**2
        voxels[inside] = 90 + 30 * label
        labels[inside] = label
    return voxels + rng.normal(0, 12, voxels.shape).astype(np.float32), labels


def organ_annotation(volume, labels):
    ml = abs(np.linalg.det(volume.affine[:3, :3])) / 1000
    segments = [
        Segment(int(i), ORGANS[int(i)], n := int((labels == i).sum()), n * ml, 1, (0, 0, 0, *labels.shape))
        for i in np.unique(labels)
        if i
    ]
    label_map = LabelMap.encode(labels, volume.affine)
    return Annotation(volume.content_key, "ORGANS", "organs", segments=tuple(segments), labels=label_map)


def question(text, answer, kind, source, expert=None, args="", oracle=False):
    options = ["yes", "no"] if answer in ("yes", "no") else ["CT", "chest X-ray"]
    return {
        "question": text, "answer": answer, "type": kind, "label_source": source, "options": options,
        "expert": expert, "args": args, "oracle": oracle,
    }  # fmt: skip


def example(name, ref, key, modality, qa, licence):
    turns = []
    for position, one in enumerate(qa):
        head = "<image>\n" if position == 0 else ""
        turns += [Turn("user", head + one["question"]), Turn("assistant", one["answer"], True)]
    sample = name.split("/")[1]
    meta = {
        "dataset": "quickstart/instruct", "split": "heldout", "sample": sample, "modality": modality,
        "patient": f"patient-{sample}", "licence": licence, "origin": "generated", "input_key": key, "qa": qa,
        "question_types": [one["type"] for one in qa], "label_source": [one["label_source"] for one in qa],
    }  # fmt: skip
    return Example(name, "conversation", (ref,), tuple(turns), (), meta).validate()


def make_data(folder, films=12, licence="CC-BY-4.0"):
    """Writes dataset and annotations; returns the examples and the annotations by input key."""
    examples, notes = [], {}
    (folder / "data" / "images").mkdir(parents=True)
    for number in range(2):
        voxels, labels = phantom(number)
        path = folder / "data" / "images" / f"ct{number}.nii.gz"
        nib.save(nib.Nifti1Image(voxels, np.diag([8.0, 8.0, 10.0, 1.0])), path)
        volume = load_volume(path)
        notes[volume.content_key] = organ_annotation(volume, labels)
        for index in (16, 20, 24):
            shown = set(np.unique(labels[:, :, index]).tolist())
            qa = [question("Which modality is this?", "CT", "modality", "image header")]
            qa += [
                question(
                    f"Is the {organ} visible?", "yes" if i in shown else "no", "organ_present",
                    "TotalSegmentator reference map", "ORGANS", "organs", True,
                )
                for i, organ in ORGANS.items()
            ]  # fmt: skip
            ref = ImageRef(path=f"images/ct{number}.nii.gz", axis=2, index=index, window=(50.0, 400.0))
            name = f"instruct/ct{number}/axial/{index}"
            examples.append(example(name, ref, volume.content_key, "CT", qa, licence))
    for number in range(films):
        image = np.random.default_rng(number).normal(110, 30, (24, 24, 3)).clip(0, 255).astype(np.uint8)
        image = np.kron(image, np.ones((4, 4, 1), np.uint8))
        key = image_key(image)
        sick = number % 2 == 0
        chances = {"normal": 0.1 + 0.8 * (not sick), "pneumonia": 0.9 - 0.8 * (not sick)}
        notes[key] = Annotation(key, "PNEUMONIA", "", probabilities=chances)
        qa = [
            question("Which modality is this?", "chest X-ray", "modality", "image header"),
            question(
                "Is there pneumonia?",
                "yes" if sick else "no",
                "pneumonia",
                "class name of the film",
                "PNEUMONIA",
            ),
        ]
        ref = ImageRef(data=encode_png(image))
        examples.append(example(f"instruct/film{number}/0", ref, key, "chest X-ray", qa, licence))
    with ExampleWriter(
        folder / "data" / "instruct", "heldout", name="quickstart/instruct", data_root=".."
    ) as writer:
        for one in examples:
            writer.write(one)
    with AnnotationWriter(folder / "annotations") as writer:
        for note in notes.values():
            writer.write(note)
    return examples, notes


def make_row(arm, one, position, qa, note):
    rng = random.Random(f"{arm}/{one.id}/{position}")
    right = rng.random() < SHARE[arm]
    called = arm in ("stage4_experts", "stage4_falsified") and qa["expert"] and rng.random() < 0.9
    others = [option for option in qa["options"] if option != qa["answer"]]
    unparsed = not right and rng.random() < 0.1
    output = qa["answer"] if right else "I see an image." if unparsed else others[0]
    row = {
        "item": f"{one.id}/q{position}", "cluster": one.meta["patient"], "arm": arm,
        "modality": one.meta["modality"],
        "question_type": qa["type"], "label_source": qa["label_source"], "oracle": qa["oracle"],
        "question": qa["question"], "gold": qa["answer"], "output": output,
        "parsed": None if unparsed else output, "correct": right, "unparsed": unparsed,
        "expert": qa["expert"],
    }  # fmt: skip
    if arm == "majority":
        return row
    row |= {"trigger": None, "expert_called": None, "expert_right": False if qa["expert"] else None}
    row |= {"expert_text": None, "falsify_seed": 7 if arm == "stage4_falsified" else None}
    if called:
        ref = one.images[0]
        kind = "segmentation" if qa["expert"] == "ORGANS" else "classification"
        row |= {"expert_called": qa["expert"], "expert_right": True}
        row["trigger"] = f"<{qa['expert']}({qa['args']})>"
        result = Result(note, kind, Plane(ref.axis, ref.index))
        row["expert_text"] = exchange([result], qa["question"]).text
    return row


def make_stage(folder, number, steps=60):
    rng = random.Random(number)
    folder.mkdir(parents=True)
    floor, start = 0.4 + 0.3 * number, 4.0 + number
    rows = []
    for step in range(0, steps + 1):
        loss = floor + (start - floor) * math.exp(-4 * step / steps)
        if step % 15 == 0:
            rows.append(
                {"step": step, "heldout_true": loss + 0.1, "heldout_swapped": loss + 0.1 + 0.8 * step / steps}
            )
        if step:
            speed = 160 + rng.gauss(0, 6)
            rows.append(
                {
                    "step": step,
                    "loss": loss + rng.gauss(0, 0.1),
                    "tokens": 512 * step,
                    "tokens_per_second": speed,
                }
            )
    heldout = [row for row in rows if "heldout_true" in row]
    result = {
        "name": STAGES[number], "steps": steps, "tokens": 512 * steps, "loss_first": start,
        "loss_last": floor,
        "heldout_first": heldout[0]["heldout_true"], "heldout_true": heldout[-1]["heldout_true"],
        "heldout_swapped": heldout[-1]["heldout_swapped"], "seconds": 90.0 + number,
        "tokens_per_second": 160.0,
        "peak_rss": 2 << 30, "finished": True,
    }  # fmt: skip
    model = {
        "name": "smollm2_135m", "image_size": 64, "vision_tower": {"num_layers": 4, "hidden_size": 192},
        "llm": {"num_layers": 30, "hidden_size": 576},
    }  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "config.json").write_text(
        json.dumps({"name": STAGES[number], "num_steps": steps, "model": model})
    )


def make_run(folder, **data):
    """Writes the whole folder and returns it."""
    examples, notes = make_data(folder, **data)
    for number, name in enumerate(STAGES):
        make_stage(folder / "stages" / name, number)
    for arm in SHARE:
        rows = [
            make_row(arm, one, position, qa, notes[one.meta["input_key"]])
            for one in examples
            for position, qa in enumerate(one.meta["qa"])
        ]
        (folder / "eval" / arm).mkdir(parents=True)
        (folder / "eval" / arm / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "eval" / arm / "result.json").write_text(
            json.dumps(
                {
                    "arm": {
                        "name": arm,
                        "experts": EXPERTS.get(arm, "off"),
                        "images": IMAGES.get(arm, "true"),
                    },
                    "data": str(folder / "data"),
                    "annotations": str(folder / "annotations"),
                    "protocol_hash": "p",
                    "items_hash": "i",
                }
            )
        )
    steps = {
        "samples": {"finished": True, "seconds": 500.0, "command": "python -m vilam3_jax.datasets.samples"},
        "prepare": {"finished": True, "seconds": 20.5, "command": "vilam3 prepare quickstart --size default"},
        "stage1_vision": {"finished": True, "seconds": 90.0, "command": "vilam3 train"},
        "report": {"finished": False, "seconds": None, "command": "vilam3 report"},
    }
    machine = {"platform": "Linux-6.1", "processor": "a processor", "cores": 2, "memory_bytes": 8 << 30}
    machine["matmul_precision"] = "bfloat16"
    record = {
        "steps": steps,
        "machine": machine,
        "versions": {"python": "3.11.7", "jax": "0.10.2"},
        "peak_rss": 3 << 30,
    }
    (folder / "quickstart.json").write_text(json.dumps(record))
    retrieval = {
        "accuracy": 0.86, "balanced_accuracy": 0.8, "chance": 0.5, "majority": 0.6, "n": 36, "clusters": 14,
        "interval": [0.7, 0.95], "per_cluster": {}, "note": "", "protocol": {"id": "retrieval"},
        "per_class": {"CT": {"n": 20, "clusters": 2, "accuracy": 0.9}}, "confusion": {},
    }  # fmt: skip
    (folder / "eval" / "retrieval.json").write_text(json.dumps(retrieval))
    return folder
