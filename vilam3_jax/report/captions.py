"""What the report says in words: names, captions, footnotes, and numbers as people read them."""

from __future__ import annotations

import math
from typing import Any

from vilam3_jax.evals.statistics import TOO_FEW as TOO_FEW

NONE = "–"
_NARROW = "\u202f"  # narrow no-break space
BANNER = (
    "A demonstration on a few public samples. The experts are stand-ins of public-package quality, not the"
    " experts of VILA-M3: what they say may be wrong, and so may every answer below."
)
LOSS_CAPTION = (
    "Loss by optimizer step. Discs: held-out volumes with their own images; diamonds: the same questions "
    "with the images exchanged between samples. A model that looks at its images has the discs below the "
    "diamonds."
)
SPEED_CAPTION = (
    "Tokens per second between two logged steps, image tokens included, padding excluded. The axis starts "
    "at 0."
)
TELEMETRY_CAPTION = (
    "By optimizer step, each point over the steps since the one before. Speed leaves out evaluations and "
    "saves; MFU counts the products of vision tower, projector and language model, causal attention by half, "
    "without padding and recomputation; goodput is the time in steps that counted, of all the time since the "
    "run was first started."
)
FIGURES = {
    "token_fill": "token positions",
    "image_fill": "image slots",
    "grad_norm": "all",
    "generate_exact_match": "equal to the reference",
    "generate_token_f1": "words in common (F1)",
}
ASIDES = {
    "compile_seconds": "Compilations",
    "evaluation_seconds": "Evaluations",
    "checkpoint_stall": "Steps held up by saves",
}
STAGE_CAPTION = (
    "The runs. First and last: mean of the first and the last tenth of the logged steps. Held-out: after "
    "the last step."
)
RETRIEVAL_CAPTION = (
    "Zero-shot retrieval on held-out images: each one picks, among one text for each modality, the nearest. "
    "None of these volumes and films was seen in training."
)
PER_VOLUME_CAPTION = "Percent right by volume, for the rows above that have too few volumes for an interval."
COMPARISON_CAPTION = (
    "Paired differences in percentage points, over the questions that both arms answered. An interval that"
    " excludes 0 shows a difference."
)
BEHAVIOUR_CAPTION = (
    "How the arms answered. Unparsed: the answer holds nothing that counts as one; it is scored wrong. "
    "Expert called: the model wrote a trigger. Right expert: of the questions that an expert could answer,"
    " the share for which exactly that one was called."
)
LICENCE_CAPTION = "What the datasets were made of, with the licence that each source states."
PIPELINE_CAPTION = (
    "The way of the data. Experts run once, in a process of their own, and write typed annotations; what "
    "they said is joined to a question when it is loaded, in training as in the evaluation."
)
ARMS_CAPTION = (
    "Right answers by arm. Whiskers: 95 % interval over volumes; open rings instead: the single volumes, "
    "where there are too few of them. The two groups of questions are never added up."
)
MAIN_CAPTION = (
    "Percent right. The right answers were not made by the experts. Bars start at 0 and end at 100."
)
ORACLE_CAPTION = (
    "Percent right, beside the falsified arm. These figures say nothing about how good the expert is."
)
ORACLE_TEXT = (
    "Here the right answers come from the imported map that the expert repeats, so an expert that is read "
    "is right by construction. The table shows whether the model reads what it is told: where the expert's "
    "record is falsified, such a model must fall."
)
DIALOGUE_TEXT = (
    "A dozen answers, chosen for variety by a fixed rule: different modalities, types of question, volumes"
    " and outcomes, right and wrong. Their share of right answers is no measure of the model; the tables "
    "are."
)
GROUPS = {
    "main": "Main table",
    "answerable": "Main table, an expert could answer",
    "oracle": "Oracle table",
}
SIZES = {"smoke": "smoke run on phantoms", "default": "short run", "full": "full run"}
_STAGES = {
    "stage1_vision": "Stage 1, vision",
    "stage2a_align": "Stage 2a, align",
    "stage2b_pretrain": "Stage 2b, pre-train",
    "stage3_instruct": "Stage 3, instruct",
    "stage4_expert": "Stage 4, experts",
}
_ARMS = {
    "stage3": "Stage 3",
    "stage4_no_experts": "Stage 4, no experts",
    "stage4_experts": "Stage 4, experts",
    "stage4_falsified": "Stage 4, falsified",
    "stage4_blank": "Stage 4, blank images",
    "majority": "Majority answer",
}
FOOTNOTES = (
    ("Stage 3", "The model after instruction tuning, before it has learnt of experts."),
    ("Stage 4, no experts", "The last model, told of no expert: it answers from the image alone."),
    (
        "Stage 4, experts",
        "The last model, told of the experts. When it writes a trigger, it is shown what that expert said "
        "of this image, then answers.",
    ),
    (
        "Stage 4, falsified",
        "The same, but what the expert says is made wrong on purpose: another class on top, present "
        "structures exchanged with absent ones. A model that reads its expert must get worse here; one "
        "that does not has learnt to ignore it.",
    ),
    (
        "Stage 4, blank images",
        "The last model, told of no expert, with every image replaced by an evenly grey one: what the "
        "question alone gives away. Compare it with “Stage 4, no experts”.",
    ),
    (
        "Majority answer",
        "No model: the answer that was most often right in the training data to the same words or, where "
        "they are new, to the same type of question. What counting gets.",
    ),
    ("n", "Questions asked in that row."),
    (
        "Volumes",
        "Scans, films or patients behind the questions. Questions about one volume resemble each other, so"
        " their number says little; the number of volumes says how far the figure carries.",
    ),
    (
        "Interval",
        "95 % bootstrap interval: whole volumes are drawn again with replacement, ten thousand times. Below "
        "ten volumes it would promise "
        f"more than it knows; then the words “{TOO_FEW}” stand there, and the values of the single volumes "
        "below the table.",
    ),
    (
        "Main and oracle table",
        "In the main table the right answers come from radiologists' masks, class names of films or the "
        "geometry of the scan: the experts did not make them. In the oracle table the right answers come "
        "from the map that the expert returns, so an expert is right by construction: it shows only "
        "whether the model reads what it is told.",
    ),
    (
        "Held-out, images exchanged",
        "Loss on held-out samples when each one gets the images of another. The distance to the loss with "
        "the true images is what the model takes from images.",
    ),
    (
        "Tokens",
        "Text and image tokens that went through the model, padding excluded. Stage 1 counts the text "
        "tokens of its pairs.",
    ),
    ("Peak memory", "Largest resident size of one process of the run."),
)


def is_number(value: Any) -> bool:
    """A finite number, not a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def stage_title(name: str) -> str:
    """Name of a run for people."""
    return _STAGES.get(name, name)


def arm_title(name: str) -> str:
    """Name of an arm for people."""
    return _ARMS.get(name, name)


def type_title(name: str) -> str:
    """Name of a question type for people."""
    return "All types" if name == "all" else name.replace("_", " ").capitalize()


def count(value: Any) -> str:
    """A whole number in groups of three."""
    return f"{round(value):,}".replace(",", _NARROW) if is_number(value) else NONE


def loss(value: Any) -> str:
    """A loss with three decimals."""
    return f"{value:.3f}" if is_number(value) else NONE


def percent(value: Any) -> str:
    """A share as whole percent."""
    return f"{100 * value:.0f}{_NARROW}%" if is_number(value) else NONE


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * value:+.0f}".replace("-", "−")


def duration(seconds: Any) -> str:
    """`48 s`, `12 min 5 s`, `1 h 3 min`."""
    if not is_number(seconds):
        return NONE
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(n_bytes: Any) -> str:
    """Bytes as `1.4 GiB`."""
    if not is_number(n_bytes):
        return NONE
    for limit, unit in ((1 << 30, "GiB"), (1 << 20, "MiB")):
        if n_bytes >= limit:
            return f"{n_bytes / limit:.1f} {unit}"
    return f"{n_bytes / 1024:.1f} KiB"
