"""Studies and annotations for the tests of dialogues.

`python tests/data/dialogue_worlds.py` regenerates the golden dialogues; review them before committing.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from vilam3_jax.data.content_keys import inputs_key
from vilam3_jax.data.examples import Example, ImageRef, Turn
from vilam3_jax.data.experts.cards import load_cards, render_cards
from vilam3_jax.data.experts.dialogues.rules import RULES, Rule
from vilam3_jax.data.experts.dialogues.scene import Scene, Setting
from vilam3_jax.data.experts.exchange import Style
from vilam3_jax.data.experts.record import Annotation, LabelMap, Segment, Verdict, failed
from vilam3_jax.data.experts.wording import VILA_M3
from vilam3_jax.data.render import ImageReader, Renderer

GOLDENS = Path(__file__).parent / "goldens" / "dialogues"
ROLES = ["t1c", "t1", "t2", "flair"]
SHAPE = (40, 40, 4)
SLICE = 2
_known = {card.name: card for name in ("experts", "quickstart") for card in load_cards(name)}
CARDS = [_known[name] for name in ("BRATS", "VISTA3D", "CXR", "ORGANS", "PNEUMONIA")]
POSITIONS = 4


class Store(dict):
    def get(self, input_key: str, expert: str, args: str = "") -> Annotation | None:
        return super().get((input_key, expert, args))


def store_of(*annotations: Annotation) -> Store:
    return Store({a.key: a for a in annotations})


def annotation_of(
    key: str, expert: str, args: str, boxes: dict[int, tuple[str, int, int]], ml: float = 0.01, **fields
) -> Annotation:
    """Adjacent boxes through all slices; `boxes` maps label id to (name, side in pixels, components)."""
    labels = np.zeros(SHAPE, np.uint8)
    segments = []
    for place, (label_id, (name, side, parts)) in enumerate(sorted(boxes.items())):
        x, y = 10 * (place % 4), 10 * (place // 4)
        labels[x : x + side, y : y + side] = label_id
        voxels = side * side * SHAPE[2]
        box = (x, y, 0, x + side, y + side, SHAPE[2])
        segments.append(Segment(label_id, name, voxels, voxels * ml, parts, box))
    encoded = LabelMap.encode(labels, np.eye(4))
    return Annotation(key, expert, args, version="1", segments=tuple(segments), labels=encoded, **fields)


def slice_study(name: str, modality: str = "CT", index: int = SLICE) -> Example:
    image = ImageRef(path=f"{name}.nii.gz", axis=2, index=index)
    return Example(name, "study", (image,), meta={"modality": modality, "input_key": f"key of {name}"})


def brain_study(name: str = "brain", grade: str | None = "HGG") -> Example:
    images = tuple(ImageRef(path=f"{name}_{role}.nii.gz", axis=2, index=SLICE) for role in ROLES)
    keys = [f"key of {name} {role}" for role in ROLES]
    meta = {"modality": "MRI", "input_key": keys, "roles": ROLES}
    return Example(name, "study", images, meta=meta | ({"grade": grade} if grade else {}))


def brain_key(study: Example) -> str:
    return inputs_key(list(zip(ROLES, study.meta["input_key"], strict=True)))


def film_record(name: str = "film") -> Example:
    turns = (
        Turn("user", "<image>\nIs the heart large?"),
        Turn("assistant", "Yes, it is enlarged.", True),
        Turn("user", "Is there an effusion?"),
        Turn("assistant", "No.", True),
    )
    meta = {"modality": "CXR", "input_key": f"key of {name}"}
    return Example(name, "conversation", (ImageRef(path=f"{name}.png"),), turns, meta=meta)


TUMOR, CLEAN, BAD, BRAIN, FILM = (
    slice_study("tumor"),
    slice_study("clean"),
    slice_study("bad"),
    brain_study(),
    film_record(),
)
STUDIES = [TUMOR, CLEAN, BAD, BRAIN, FILM]
_DOUBT = Verdict(
    "volume_ml", "warn", subject="spleen", value=900.0, message="a spleen of 900 ml is very large"
)
_CXR = {"Cardiomegaly": 0.81, "Effusion": 0.12, "Pleural_Thickening": 0.33, "Pneumonia": 0.61, "Edema": 0.5}


def annotations() -> Store:
    tumor, clean, bad, film = (f"key of {name}" for name in ("tumor", "clean", "bad", "film"))
    return store_of(
        annotation_of(tumor, "VISTA3D", "hepatic tumor", {1: ("liver", 9, 1), 26: ("hepatic tumor", 6, 3)}),
        annotation_of(
            tumor, "VISTA3D", "organs", {1: ("liver", 9, 1), 3: ("spleen", 7, 1), 4: ("pancreas", 5, 1)}
        ),
        annotation_of(tumor, "VISTA3D", "skeleton", {127: ("vertebrae S1", 8, 1)}),
        annotation_of(tumor, "ORGANS", "organs", {1: ("liver", 8, 1), 10: ("gallbladder", 5, 1)}),
        annotation_of(clean, "VISTA3D", "hepatic tumor", {1: ("liver", 9, 1)}),
        annotation_of(clean, "VISTA3D", "muscles", {}),
        failed(bad, "VISTA3D", "skeleton", "out of memory"),
        annotation_of(
            bad, "VISTA3D", "organs", {1: ("liver", 5, 1), 3: ("spleen", 9, 1)}, verdicts=(_DOUBT,)
        ),
        annotation_of(
            brain_key(BRAIN),
            "BRATS",
            "",
            {1: ("non-enhancing core", 5, 1), 2: ("edema", 9, 1), 4: ("enhancing tumor", 6, 2)},
        ),
        Annotation(film, "CXR", version="1", probabilities=_CXR),
        Annotation(film, "PNEUMONIA", version="1", probabilities={"Normal": 0.8, "Pneumonia": 0.2}),
    )


def setting(store: Store | None = None, parity: bool = False, **fields) -> Setting:
    style = Style(VILA_M3) if parity else Style(verdicts=True)
    return Setting.of(CARDS, annotations() if store is None else store, style=style, parity=parity, **fields)


def scene(study: Example, made: Setting, seed: int | str = 0, experts_on: bool = True) -> Scene:
    return Scene(study, made, random.Random(str(seed)), experts_on)


def shown(example: Example, made: Setting, store: Store, experts_on: bool = True) -> str:
    """The dialogue as the model sees it, with `{CARDS}` for the card list."""
    renderer = Renderer(
        image_reader=ImageReader(8),
        experts="on" if experts_on else "off",
        cards=CARDS,
        annotations=store,
        style=made.style,
    )
    outline = renderer.outline(example.validate(), ".")
    assert sum(turn.text.count("<image>") for turn in outline.turns) == len(outline.lazy_images)
    lines = []
    for turn in outline.turns:
        text = turn.text.replace(render_cards(CARDS), "{CARDS}\n")
        lines += [f"[{turn.role}{', target' if turn.supervised else ''}]", text + "|"]
    return "\n".join(lines) + "\n"


def golden(rule: Rule, parity: bool = False) -> str:
    """Dialogues of every study that a rule fits, with and without experts; the reasons for the others."""
    store = annotations()
    made = setting(store, parity)
    out = []
    for study in STUDIES:
        reason = rule.unfit(scene(study, made))
        if reason is not None:
            out.append(f"=== {study.id}: left out, {reason}\n")
            continue
        for position in range(POSITIONS):
            example = rule.make(scene(study, made, position))
            out.append(f"=== {study.id}, position {position}\n" + shown(example, made, store))
        example = rule.make(scene(study, made, 0, experts_on=False))
        out.append(f"=== {study.id}, experts off\n" + shown(example, made, store, experts_on=False))
    return "\n".join(out)


def golden_files() -> dict[str, str]:
    plain = {f"{name}.txt": golden(rule) for name, rule in RULES.items()}
    exact = {f"parity_{n}.txt": golden(r, True) for n, r in RULES.items() if r.parity is not None}
    return plain | exact


if __name__ == "__main__":
    GOLDENS.mkdir(parents=True, exist_ok=True)
    for name, text in golden_files().items():
        (GOLDENS / name).write_text(text)
