"""Sizes of the samples of VILA-M3's mixtures, for measuring how well they pack.

Read: `stream("expert", "llama_3", tokens_per_image=196)` gives (dataset, tokens, images) in the order a run
meets them. The sizes come from `corpus_sizes.json`, which this script measures anew from the texts below:

    python benchmarks/corpus.py --reports=NLMCXR_reports.tgz --tokenizer=llama_3=FOLDER --tokenizer=v1=FOLDER

What is published: datasets and repeat counts, the conversations around expert calls, the card list. Reports
are the real ones of Indiana University (of the torchxrayvision package, where the quickstart takes them too).
What is assumed, because nothing is published: CT groups in equal parts; 1 to 12 coloured labels on a slice;
three to four questions a MIMIC-VQA dialogue (429,000 questions on 129,000 images); USMLE questions of 117
words on average, four options; captions of 4 to 40 words; of pre-training's web data, in equal parts, groups
of four captioned images, documents with 0 to 6 images, and one image with a long description.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

SIZES = Path(__file__).with_name("corpus_sizes.json")
QUANTILES = 200

# Dataset -> samples of an epoch. "expert" is VILA-M3's published mixture with its repeats; a dataset whose
# samples have different numbers of images stands in parts.
MIXTURES: dict[str, dict[str, int]] = {
    "expert": {
        "usmle": 101_780,
        "radvqa": 100_496,
        "slake": 95_552,
        "pathvqa": 104_136,
        "mimic_vqa": 258_464,
        "report": 270_000,
        "report_expert": 270_000,
        "vista3d_lesion": 160_000,
        "vista3d_segment": 120_000,
        "vista3d_what": 120_000,
        "brats_what": 80_000,
        "brats_grade": 80_000,
        "brats_segment": 80_000,
    },
    # The same without experts: what stage 3 is trained on here.
    "instruct": {
        "usmle": 101_780,
        "radvqa": 100_496,
        "slake": 95_552,
        "pathvqa": 104_136,
        "mimic_vqa_plain": 258_464,
        "report": 270_000,
    },
    "align": {"caption": 595_000},
    "pretrain": {"web_pairs": 1, "web_document": 1, "web_description": 1},
}
MIXTURES["pretrain_medical"] = {"report": 7, "report_text": 3}

_LESIONS = ("hepatic tumor", "pancreatic tumor", "lung tumor", "bone lesion")
_GROUPS = ("everything", "organs", "cardiovascular", "gastrointestinal", "skeleton", "muscles")
_LABELS = (
    "liver", "spleen", "pancreas", "right kidney", "aorta", "inferior vena cava", "gallbladder", "stomach",
    "left lung upper lobe", "right lung lower lobe", "vertebrae T12", "left rib 7",
    "portal vein and splenic vein", "left hip", "small bowel", "colon", "spinal cord", "left iliopsoas",
    "heart", "hepatic tumor",
)  # fmt: skip
_COLOURS = ("red", "blue", "yellow", "magenta", "green", "indigo", "darkorange", "cyan", "pink", "brown")
_FINDINGS = (
    "atelectasis", "consolidation", "infiltration", "pneumothorax", "edema", "emphysema", "fibrosis",
    "effusion", "pneumonia", "pleural thickening", "cardiomegaly", "nodule", "mass", "hernia", "lung lesion",
    "fracture",
    "lung opacity", "enlarged cardiomediastinum",
)  # fmt: skip
_VQA = (
    ("is there evidence of an aortic aneurysm?", "no"),
    ("what is the organ system?", "gastrointestinal"),
    ("are the lungs normal appearing?", "no"),
    ("which side is the mass on in this ct scan of the chest?", "the left side"),
    ("what is present?", "cardiovascular"),
    ("does this image show a metastatic carcinoma in the lung?", "yes"),
    ("what modality is used to take this image?", "mri"),
    ("where is the abnormality located in the picture?", "right upper quadrant"),
)
_FILM_QUESTIONS = (
    ("what abnormalities are seen in this image?", "pleural effusion, atelectasis, cardiomegaly."),
    ("is there evidence of {finding} in this image?", "no."),
    ("where in the image is the {finding} located?", "left lower lung."),
    ("what level is the {finding}?", "mild."),
    ("what type is the {finding}?", "interstitial."),
    ("which view is this image taken?", "AP view."),
)
_WHAT = (
    "What can be seen in this scan?",
    "Can you describe what's in the image?",
    "What do you see?",
    "Can you tell me what's in the image?",
)

Turns = list[tuple[str, str]]  # (user | assistant, text)


class Texts:
    """Writes conversations. `reports` are real report texts, whose words also fill longer texts."""

    def __init__(self, reports: Sequence[str], cards: str, seed: int = 0) -> None:
        self._reports = reports
        self._cards = cards
        self._words = " ".join(reports).split()
        self._rng = np.random.default_rng(seed)

    def write(self, dataset: str) -> Turns:
        """One conversation of a dataset."""
        return getattr(self, f"_{dataset}")()

    def _pick(self, choices: Sequence) -> tuple | str:
        return choices[int(self._rng.integers(len(choices)))]

    def _running(self, words: int) -> str:
        start = int(self._rng.integers(len(self._words) - words))
        return " ".join(self._words[start : start + words])

    def _usmle(self) -> Turns:
        words = int(np.clip(self._rng.lognormal(np.log(117) - 0.08, 0.4), 20, 530))
        options = [self._running(int(self._rng.integers(1, 7))) for _ in "ABCD"]
        listed = "".join(f"\n({letter}) {text}" for letter, text in zip("ABCD", options, strict=True))
        return [("user", self._running(words) + listed), ("assistant", f"(B) {options[1]}")]

    def _vqa(self) -> Turns:
        question, answer = self._pick(_VQA)
        return [("user", f"<image>\n{question}"), ("assistant", answer)]

    _radvqa = _slake = _pathvqa = _vqa

    def _film_dialogue(self) -> Turns:
        turns: Turns = []
        for _ in range(int(self._rng.choice([1, 2, 3, 4, 5, 6], p=[0.1, 0.2, 0.25, 0.25, 0.1, 0.1]))):
            question, answer = self._pick(_FILM_QUESTIONS)
            turns += [("user", question.format(finding=self._pick(_FINDINGS))), ("assistant", answer)]
        return turns

    def _with_film_expert(self, turns: Turns) -> Turns:
        question = turns[0][1]
        said = "".join(f"{name}: {self._pick(('yes', 'no', 'no'))}\n" for name in _FINDINGS)
        return [
            ("user", f"{self._cards}<image> This is a CXR image.\n{question}"),
            ("assistant", "This looks like an chest x-ray. Let me first trigger <CXR()>."),
            (
                "user",
                f"The resulting predictions are:\n{said}. Analyze the image and take these predictions into "
                f"account when responding to this prompt:\n{question}",
            ),
            *turns[1:],
        ]

    def _mimic_vqa(self) -> Turns:
        return self._with_film_expert(self._film_dialogue())

    def _mimic_vqa_plain(self) -> Turns:
        (_, question), *rest = self._film_dialogue()
        return [("user", f"{question}\n<image>"), *rest]

    def _report(self) -> Turns:
        return [("user", "<image>\nDescribe the image in detail."), ("assistant", self._pick(self._reports))]

    def _report_text(self) -> Turns:
        return [("assistant", self._pick(self._reports))]

    def _report_expert(self) -> Turns:
        turns = [("user", "Describe the image in detail."), ("assistant", self._pick(self._reports))]
        return self._with_film_expert(turns)

    def _legend(self) -> str:
        names = self._rng.permutation(_LABELS)[: int(self._rng.integers(1, 13))]
        return ", ".join(f"{_COLOURS[i % len(_COLOURS)]}: {name}" for i, name in enumerate(names))

    def _ct(self, question: str, group: str, answer: str) -> Turns:
        return [
            ("user", f"{self._cards} <image>This is a CT image.\n{question}"),
            ("assistant", f"This looks like a CT image. Let me trigger <VISTA3D({group})>. "),
            (
                "user",
                f"The results are <image>. The colors in this image describe {self._legend()}. Use this "
                f"result to respond to this prompt:\n{question}.",
            ),
            ("assistant", answer),
        ]

    def _vista3d_lesion(self) -> Turns:
        lesion = self._pick(_LESIONS)
        turns = self._ct(f"Can you identify any {lesion}s in this scan?", str(lesion), "yes")
        if self._rng.random() < 0.5:
            turns += [("user", "How many are there?"), ("assistant", f"There are 3 {lesion}s.")]
        return turns

    def _vista3d_segment(self) -> Turns:
        group = self._pick(_GROUPS)
        return [
            (
                "user",
                f"{self._cards} <image>This is a CT image.\nCould you segment the {group} in this image?",
            ),
            ("assistant", f"I segmented the {group} using <VISTA3D({group})>."),
        ]

    def _vista3d_what(self) -> Turns:
        answer = "This a CT image. It contains several anatomical structures such as identified by VISTA3D: "
        return self._ct(str(self._pick(_WHAT)), str(self._pick(_GROUPS)), answer + self._legend())

    def _brats_what(self) -> Turns:
        return [("user", f"<image>\n{self._pick(_WHAT)}"), ("assistant", "This is a brain MRI scan.")]

    def _mri(self, question: str, trigger: str, answer: str) -> Turns:
        names = ("T1(contrast enhanced)", "T1", "T2", "FLAIR")
        return [
            (
                "user",
                self._cards + ", ".join(f"{name}: <image>" for name in names) + " These are different MRI "
                f"modalities.\n{question}",
            ),
            ("assistant", trigger),
            (
                "user",
                "The results are <image>. The colors in this image describe\nyellow and red: tumor core, "
                "only yellow: enhancing tumor, all colors: whole tumor\nUse this result to respond to this "
                f"prompt:\n{question}.",
            ),
            ("assistant", answer),
        ]

    def _brats_grade(self) -> Turns:
        return self._mri(
            "What glioma grade is shown in the image?",
            "This looks like an MRI image sequence. Let me first trigger <BRATS()>.",
            "The scan indicates high grade glioma.",
        )

    def _brats_segment(self) -> Turns:
        trigger = "I segmented any brain tumors using <BRATS()>."
        return self._mri("Segment any tumors in the image", trigger, "All tumors were segmented")

    def _caption(self) -> Turns:
        return [("user", "<image>"), ("assistant", self._running(int(self._rng.integers(4, 41))))]

    def _web_pairs(self) -> Turns:
        return [
            (
                "assistant",
                "".join(f"<image>{self._running(int(self._rng.integers(4, 41)))}" for _ in range(4)),
            )
        ]

    def _web_document(self) -> Turns:
        parts = [
            self._running(int(self._rng.integers(20, 400))) for _ in range(int(self._rng.integers(1, 8)))
        ]
        return [("assistant", "<image>".join(parts))]

    def _web_description(self) -> Turns:
        words = int(self._rng.integers(80, 240))
        return [("user", "<image>\nDescribe the image."), ("assistant", self._running(words))]


def datasets() -> list[str]:
    """All dataset names, in the order of the mixtures."""
    return list(dict.fromkeys(name for mixture in MIXTURES.values() for name in mixture))


def measure(reports: Path, tokenizers: dict[str, Path]) -> dict:
    """Template -> dataset -> [[tokens of the text, images], ...], evenly spaced over the sorted sizes."""
    from vilam3_jax.data.examples import Turn
    from vilam3_jax.data.experts.cards import load_cards, render_cards
    from vilam3_jax.data.render import encode_example
    from vilam3_jax.data.templates import get_template
    from vilam3_jax.data.tokenizer import load_tokenizer
    from vilam3_jax.datasets.reports import read_reports

    found, _ = read_reports(reports)
    forms = {
        "caption": "caption",
        "report_text": "document",
        "web_pairs": "document",
        "web_document": "document",
    }
    sizes: dict = {}
    for template, folder in tokenizers.items():
        tokenizer = load_tokenizer(folder)
        texts = Texts([r.findings for r in found if r.findings], render_cards(load_cards("vila_m3")))
        sizes[template] = {}
        for name in datasets():
            measured = []
            for _ in range(2000):
                turns = [Turn(role, text, role == "assistant") for role, text in texts.write(name)]
                encoded = encode_example(
                    tokenizer, get_template(template), forms.get(name, "conversation"), turns, 0
                )
                measured.append((len(encoded), encoded.num_images))
            measured.sort()
            step = len(measured) // QUANTILES
            sizes[template][name] = measured[step // 2 :: step]
    return sizes


def stream(
    mixture: str, template: str, tokens_per_image: int, seed: int = 0, count: int = 100_000
) -> Iterator[tuple[str, int, int]]:
    """(dataset, tokens, images) of a mixture's samples.

    Datasets are mixed as the loader mixes them, by weight and without chance; which sample of a dataset comes
    is drawn.
    """
    import grain

    table = json.loads(SIZES.read_text())[template]
    names = list(MIXTURES[mixture])
    weights = [float(MIXTURES[mixture][name]) for name in names]
    rng = np.random.default_rng(seed)
    order = grain.MapDataset.mix(
        [grain.MapDataset.source([number]).repeat() for number in range(len(names))], weights
    )
    for position in range(count):
        name = names[order[position]]
        tokens, images = table[name][int(rng.integers(len(table[name])))]
        yield name, tokens + images * tokens_per_image, images


def main(argv: Sequence[str] | None = None) -> int:
    """Measures `corpus_sizes.json`."""
    parser = argparse.ArgumentParser(description="Measure the sizes of the corpus with real tokenizers.")
    parser.add_argument(
        "--reports", required=True, type=Path, help="NLMCXR_reports.tgz of torchxrayvision 1.5.7"
    )
    parser.add_argument(
        "--tokenizer", required=True, action="append", metavar="TEMPLATE=FOLDER", help="may be given again"
    )
    args = parser.parse_args(argv)
    folders = {name: Path(folder) for name, _, folder in (item.partition("=") for item in args.tokenizer)}
    sizes = measure(args.reports, folders)
    rows = [
        f" {json.dumps(template)}: {{\n"
        + ",\n".join(
            f"  {json.dumps(name)}: {json.dumps(pairs, separators=(',', ':'))}"
            for name, pairs in table.items()
        )
        + "\n }"
        for template, table in sizes.items()
    ]
    SIZES.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    for template, table in sizes.items():
        for name, pairs in table.items():
            tokens, images = np.mean(pairs, axis=0)
            print(f"{template:8} {name:16} {tokens:7.1f} tokens of text, {images:.2f} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
