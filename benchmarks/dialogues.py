"""How fast a rule's records are found and its dialogues made.

Run: python benchmarks/dialogues.py [--records 20000]

Slices of made-up CT scans of 512 x 512 x 64 voxels with 30 structures, three annotations each; a warm
disk. Times are of the processor, in one thread.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.data.experts.cards import load_cards
from vilam3_jax.data.experts.dialogues.rules import RULES
from vilam3_jax.data.experts.dialogues.scene import Setting
from vilam3_jax.data.experts.dialogues.source import under_rules
from vilam3_jax.data.experts.labels import label_table
from vilam3_jax.data.experts.record import Annotation, LabelMap, Segment
from vilam3_jax.data.experts.store import AnnotationStore, AnnotationWriter
from vilam3_jax.data.records import ExampleSource, ExampleWriter

SHAPE = (512, 512, 64)
ARGS = ("organs", "everything", "hepatic tumor")
RULE_NAMES = ("ct_tumor", "ct_segment", "ct_what", "several_calls", "expert_failed")


def annotation(key: str, args: str, rng: np.random.Generator) -> Annotation:
    labels = np.zeros(SHAPE, np.uint8)
    segments = []
    for label_id in [*sorted(rng.choice(np.arange(1, 127), 29, replace=False).tolist()), 26]:
        low = rng.integers(0, 400, 3) * (1, 1, 0.1)
        box = tuple(slice(int(a), int(a) + 80) for a in low)
        labels[box] = label_id
        name = label_table("VISTA3D")[label_id]
        segments.append(Segment(label_id, name, 1, 1.0, 1, (0, 0, 0, 1, 1, 1)))
    segments = tuple({s.label_id: s for s in segments}.values())
    return Annotation(key, "VISTA3D", args, segments=segments, labels=LabelMap.encode(labels, np.eye(4)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--scans", type=int, default=40)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with AnnotationWriter(root / "said") as writer:
            for scan in range(options.scans):
                for args in ARGS:
                    writer.write(annotation(f"scan{scan}", args, rng))
        each = options.records // options.scans
        with ExampleWriter(root / "slices", "train") as writer:
            for scan in range(options.scans):
                for number in range(each):
                    image = ImageRef(path=f"{scan}.nii.gz", axis=2, index=number % SHAPE[2])
                    meta = {"modality": "CT", "input_key": f"scan{scan}"}
                    writer.write(Example(f"{scan}-{number}", "study", (image,), meta=meta))
        source = ExampleSource(root / "slices", "train")
        setting = Setting.of(load_cards("experts"), AnnotationStore(root / "said"))
        rules = [RULES[name] for name in RULE_NAMES]
        start = time.process_time()
        found = under_rules(source, rules, setting, 0)
        seconds = time.process_time() - start
        print(
            f"{len(source)} records under {len(rules)} rules: {seconds:.1f} s, {len(source) / seconds:.0f}/s"
        )
        for ruled in found:
            if not len(ruled):
                continue
            start, count = time.process_time(), 500
            for position in range(count):
                try:
                    ruled.dialogue(position * 7 % len(ruled), position, True)
                except Exception as error:
                    if "too few" not in str(error):
                        raise
            print(f"{ruled.name}: {(time.process_time() - start) / count * 1000:.2f} ms a dialogue")


if __name__ == "__main__":
    main()
