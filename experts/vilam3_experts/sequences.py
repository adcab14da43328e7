"""Detects the MRI sequence of a volume: native or contrast-enhanced T1, T2 or FLAIR.

There are two kinds of evidence: words, in the file's name or the description of a DICOM series; and
acquisition parameters, which are echo, repetition and inversion times, the kind of sequence and the contrast
agent. If words and parameters contradict each other, or the words name two sequences, no role is assigned.

A T1 without any sign of contrast counts as native, because files rarely say so, and `Finding.assumed` is set.
This is safe if the same case has a T1 that does show contrast.

Descriptions may identify a patient, so findings quote only words from the lists below.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pydicom

from vilam3_jax.data.dicom.headers import functional_group, numbers, wrap_dicom_errors
from vilam3_jax.runtime.paths import PathLike

Weighting = Literal["t1", "t2", "flair", "other"]
ROLES = ("t1c", "t1", "t2", "flair")


@dataclasses.dataclass(frozen=True)
class Finding:
    """The sequence of a volume, according to the evidence.

    `role` is one of `ROLES`, or None; then `problem` is why there is none although the volume may have one,
    or `other` what it is instead, such as "a segmentation". `evidence` is readable and without patient data.
    A T1 is `assumed` if it counts as native only because there is no sign of contrast.
    """

    role: str | None = None
    evidence: str = ""
    problem: str = ""
    other: str = ""
    assumed: bool = False


@dataclasses.dataclass(frozen=True)
class Acquisition:
    """The acquisition parameters in a header; None or '' if missing.

    `texts` are series description and protocol name; `contrast` is the AcquisitionContrast of an enhanced MR
    object, such as "FLUID_ATTENUATED"; `kinds` are ScanningSequence values: SE, IR, GR, EP, RM. Times are in
    milliseconds.
    """

    texts: tuple[str, ...] = ()
    agent: str = ""
    contrast: str = ""
    kinds: frozenset[str] = frozenset()
    echo: float | None = None
    repetition: float | None = None
    inversion: float | None = None


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_T1_WORDS = _words("t1 mprage mpr bravo spgr fspgr tfl vibe flash")
_FLAIR_WORDS = _words("flair darkfluid")
_WITH = _words("""
    ce gd gad gado gadolinium gadovist gadavist dotarem clariscan magnevist multihance prohance omniscan gbca
    km post postcontrast postgd contrast enhanced kontrast kontrastmittel mdc
""")
_WITHOUT = _words("""
    pre precontrast pregd native nativ noncontrast nongd unenhanced nocontrast nogd noce
""")
_NEGATIONS = _words("no non without wo ohne sans senza sin not")
# After 'post' or 'pre', these state the time of the scan instead of its contrast.
_EVENTS = _words("op operative surgery surgical treatment therapy rt tx chemo radiation resection")
_EVENT_WORDS = _words("postop preop postoperative preoperative postrt posttreatment")
_SEGMENTATIONS = _words("""
    seg segm segmentation segmentations pveseg mask masks brainmask label labels labelmap glistrboost
    groundtruth
""")
_OTHERS = _words("""
    t2star swi swan dwi adc dti diff diffusion trace tensor epi perf perfusion dsc dce asl tof mra angio pd
    pdw stir localizer localiser scout survey t1map t2map map mapping bold fmri cbv rcbv cbf mtt ttp
    subtraction subtracted mip minip qsm fieldmap mrs svs csi mp2rage fgatir ktrans hemo medic
""")
_GRADIENT = _words("gre ffe gradient")
_LINKS = _words("to in on reg registered coreg coregistered")  # 't1 to t1c': one in the space of the other
_ACQUISITION_WORDS = _words("""
    ax axial tra trans transversal transverse sag sagittal cor coronal obl 3d 2d se tse fse tfe ffe gre space
    spc cube vista iso fs fatsat fat sat ir tirm dark fluid w wi weighted spin echo brain head cerebrum mri
    mr blade propeller vol volume image scan
""")
_WORDS = (
    _T1_WORDS | _FLAIR_WORDS | {"t2"} | _WITH | _WITHOUT | _SEGMENTATIONS | _OTHERS | _GRADIENT | _EVENT_WORDS
)
# The abbreviations of BraTS and of similar collections.
_SHORT = {
    "t1n": ("t1", "native"),
    "t1c": ("t1", "ce"),
    "t2f": ("t2", "flair"),
    "ct1": ("t1", "ce"),
    "cet1": ("t1", "ce"),
    "t1ca": ("t1", "ce"),
}
_PIECES = sorted(_WORDS | _ACQUISITION_WORDS | {"c", "n"}, key=len, reverse=True)
# Possessive, because a long name that splits in many ways would cause backtracking.
_GLUED = re.compile(f"(?:{'|'.join(map(re.escape, _PIECES))})++")
_PIECE = re.compile("|".join(map(re.escape, _PIECES)))
_NO_AGENT = {"", "NONE", "NO", "N", "NA", "N/A", "NIL", "0", "FALSE", "WITHOUT", "UNKNOWN"}
_BIDS = re.compile(r"sub-[A-Za-z0-9]+(?:_[a-z]+-[A-Za-z0-9]+)*_(?P<suffix>[A-Za-z0-9]+)")
_BIDS_SUFFIXES = {"T1w": "t1", "T2w": "t2", "FLAIR": "flair"}
_ENDING = re.compile(r"(?:\.nii|\.nrrd|\.nhdr|\.mha|\.mhd|\.hdr|\.img|\.dcm)?(?:\.gz)?$", re.IGNORECASE)


def stem(name: str) -> str:
    """A file's name without the suffixes of volume files."""
    return _ENDING.sub("", name, count=1)


def split_words(text: str) -> list[str]:
    """The words of a name or description in lower case, with expanded abbreviations.

    >>> split_words("T1+C"), split_words("axT2flair"), split_words("T1 w/o contrast")
    (['t1', 'ce'], ['ax', 't2', 'flair'], ['t1', 'without', 'contrast'])
    """
    text = text.lower().replace("t2*", " t2star ").replace("w/o", " without ").replace("+c", " ce ")
    text = re.sub(r"(?<![a-z0-9])c\+", " ce ", text)
    found: list[str] = []
    for token in re.findall("[a-z0-9]+", text):
        token = "seg" if re.fullmatch(r"seg\d+", token) else token
        found += _SHORT.get(token) or _pieces(token)
    return found


def _pieces(token: str) -> list[str]:
    """Splits a token that consists of known words; returns any other token unchanged."""
    if token in _WORDS or token in _ACQUISITION_WORDS or not _GLUED.fullmatch(token):
        return [token]
    pieces: list[str] = _PIECE.findall(token)
    # A single letter is meaningful only after T1: t1c, t1wc, t1n.
    if any(piece in ("c", "n") for piece in pieces) and pieces[0] != "t1":
        return [token]
    return [{"c": "ce", "n": "native"}.get(piece, piece) for piece in pieces]


def without_sequence(text: str) -> str:
    """A name without the words for sequences and acquisition, which is the same for all files of a case."""
    dropped = _WORDS | _ACQUISITION_WORDS | _NEGATIONS | _LINKS
    return "_".join(word for word in split_words(stem(text)) if word not in dropped)


def bids_case(name: str) -> str | None:
    """Subject and session of a BIDS file name, such as 'sub-01_ses-1'; None for any other name."""
    if not _BIDS.fullmatch(stem(name)):
        return None
    return "_".join(part for part in stem(name).split("_") if part.startswith(("sub-", "ses-")))


def from_name(name: str) -> Finding:
    """Detects the sequence by a file's name.

    Supports BIDS (the suffix, and the entities `ce-` and `acq-` for contrast), the names of BraTS since 2012
    (t1ce, t1c, t1gd, t1n, t2w, t2f, flair), and names common in hospitals and archives.
    """
    plain = stem(name)
    bids = _BIDS.fullmatch(plain)
    if bids is None:
        return _from_words(split_words(plain), "its name")
    weighting = _BIDS_SUFFIXES.get(bids["suffix"])
    if weighting is None:
        return Finding(other=f"BIDS suffix {bids['suffix'][:20]}")
    entities = [part.partition("-")[2] for part in plain.split("_") if part.startswith(("ce-", "acq-"))]
    words = [word for value in entities for word in split_words(value)]
    stated = any(part.startswith("ce-") for part in plain.split("_"))
    words = [word for word in words if word in _WITH | _WITHOUT | _NEGATIONS | {"none"}]
    if stated and not words:  # ce- names an agent
        words = ["ce"]
    if "none" in words:
        words = ["native"]
    return _from_words([weighting, *words], "its BIDS name")


def from_acquisition(acquisition: Acquisition) -> Finding:
    """Detects the sequence by a header.

    The limits of the times are for clinical field strengths, 1 to 3 T. Times alone may be ambiguous: a
    gradient echo with a short echo time is a T1 or an angiography, and the words decide.
    """
    words = _from_texts(acquisition.texts)
    possible, facts = _by_times(acquisition)
    if words.other or words.problem:
        return words
    agent = acquisition.agent.strip().upper() not in _NO_AGENT
    recorded = "a contrast agent is recorded" if agent else ""
    evidence = "; ".join(filter(None, [words.evidence, facts, recorded]))
    weighting: str | None = "t1" if words.role == "t1c" else words.role
    if weighting is None:
        if possible is None or len(possible) != 1:
            return Finding(evidence=evidence)
        (weighting,) = possible
        if weighting == "other":
            return Finding(evidence=evidence, other="another MRI sequence")
    elif possible is not None and weighting not in possible:
        named = " or ".join(sorted(possible))
        problem = f"described as {weighting}, but its times are those of {named}"
        return Finding(evidence=evidence, problem=problem)
    if weighting in ("t2", "flair"):
        return Finding(weighting, evidence)
    is_native = words.role == "t1" and not words.assumed
    if is_native and agent:
        return Finding(evidence=evidence, problem="described as native, but a contrast agent is recorded")
    role = "t1c" if agent or words.role == "t1c" else "t1"
    return Finding(role, evidence, assumed=role == "t1" and not is_native)


def from_dicom(header: pydicom.Dataset, path: PathLike) -> Finding:
    """`from_acquisition` of a header of `dicom.headers.read_mr_header`, classic or enhanced MR.

    Raises `UserError`, which names `path`, if the header is damaged.
    """
    with wrap_dicom_errors(path):
        return from_acquisition(_acquisition(header))


def from_sidecar(sidecar: Mapping[str, Any]) -> Finding:
    """`from_acquisition` of a BIDS JSON sidecar, whose times are in seconds."""

    def text(name: str) -> str:
        value = sidecar.get(name)
        return value if isinstance(value, str) else ""

    def milliseconds(name: str) -> float | None:
        value = sidecar.get(name)
        return float(value) * 1000 if isinstance(value, (int, float)) else None

    kinds = sidecar.get("ScanningSequence") or ""
    kinds = kinds if isinstance(kinds, str) else "_".join(map(str, kinds)) if isinstance(kinds, list) else ""
    return from_acquisition(
        Acquisition(
            (text("SeriesDescription"), text("ProtocolName")),
            text("ContrastBolusAgent") or text("ContrastBolusIngredient"),
            "",
            frozenset(re.findall(r"[A-Z]{2}", kinds)),
            milliseconds("EchoTime"),
            milliseconds("RepetitionTime"),
            milliseconds("InversionTime"),
        )
    )


def _acquisition(header: pydicom.Dataset) -> Acquisition:
    def first(keyword: str, group: str) -> float | None:
        macro = functional_group(header, 0, group)
        for item in (header, macro):
            values = [] if item is None else numbers(item, keyword)
            if values and values[0] is not None:
                return values[0]
        return None

    echo = first("EchoTime", "MREchoSequence")
    inversion = first("InversionTime", "MRModifierSequence")
    if inversion is None:
        inversion = first("InversionTimes", "MRModifierSequence")
    agents = [str(header.get("ContrastBolusAgent") or "")]
    for item in header.get("ContrastBolusAgentSequence") or ():
        agents.append(str(item.get("CodeMeaning") or item.get("ContrastBolusAgent") or "recorded"))
    kinds = header.get("ScanningSequence") or ()
    return Acquisition(
        tuple(str(header.get(name) or "") for name in ("SeriesDescription", "ProtocolName")),
        next((agent for agent in agents if agent.strip()), ""),
        str(header.get("AcquisitionContrast") or ""),
        frozenset([kinds] if isinstance(kinds, str) else map(str, kinds)),
        echo if echo is not None else first("EffectiveEchoTime", "MREchoSequence"),
        first("RepetitionTime", "MRTimingAndRelatedParametersSequence"),
        inversion,
    )


def _from_texts(texts: Sequence[str]) -> Finding:
    """The finding of the first text with one.

    A later text can only add the contrast of a T1, and only if it names T1 itself: protocol names often
    describe the whole examination ("brain with and without contrast").
    """
    findings = [_from_words(split_words(text), "its description") for text in texts]
    conclusive = [found for found in findings if found.role or found.problem or found.other]
    if not conclusive:
        return next((found for found in findings if found.evidence), Finding())
    first = conclusive[0]
    if first.role == "t1" and first.assumed:
        certain = (found for found in conclusive if found.role in ("t1", "t1c") and not found.assumed)
        return next(certain, first)
    return first


def _from_words(words: Sequence[str], where: str) -> Finding:
    known = set(words)
    shown = [word for word in dict.fromkeys(words) if word in _WORDS]
    evidence = f"{where} says {', '.join(shown)}" if shown else ""
    if segmentations := known & _SEGMENTATIONS:
        return Finding(evidence=evidence, other=f"a segmentation ({sorted(segmentations)[0]})")
    if others := known & _OTHERS:
        return Finding(evidence=evidence, other=f"another image ({sorted(others)[0]})")
    if _is_in_space_of_another(words):
        return Finding(evidence=evidence, problem=f"{where} names one sequence in the space of another")
    t1, t2 = bool(known & _T1_WORDS), "t2" in known
    flair = bool(known & _FLAIR_WORDS) or {"dark", "fluid"} <= known
    if t1 and t2:
        return Finding(evidence=evidence, problem=f"{where} names both T1 and T2")
    if t2 and known & _GRADIENT and not flair:
        return Finding(evidence=evidence, other="a T2* gradient echo")
    if t1 and flair and not _T1_FLAIR.search(" ".join(words)):
        return Finding(evidence=evidence, problem=f"{where} names both T1 and FLAIR")
    if t1:
        return _t1(words, evidence, where)
    if flair:
        return Finding("flair", evidence)
    return Finding("t2", evidence) if t2 else Finding(evidence=evidence)


_T1_FLAIR = re.compile(r"\bt1 (?:w |weighted )?flair\b")  # an inversion-recovery T1, not a FLAIR


def _is_in_space_of_another(words: Sequence[str]) -> bool:
    """Whether a link such as 'to' is between two sequences."""
    named = _T1_WORDS | _FLAIR_WORDS | {"t2"}
    places = [place for place, word in enumerate(words) if word in named]
    links = [place for place, word in enumerate(words) if word in _LINKS]
    return any(places[0] < link < places[-1] for link in links) if places else False


def _t1(words: Sequence[str], evidence: str, where: str) -> Finding:
    given, absent = _contrast(words)
    if "c" in words and not (given or absent):
        return Finding(evidence=evidence, problem=f"{where} says T1 and C, with or without contrast")
    if given and absent:
        return Finding(evidence=evidence, problem=f"{where} says both with and without contrast")
    if (given or absent) and where == "its name" and _may_be_a_time(words):
        return Finding(evidence=evidence, problem=f"{where} says pre or post before T1: contrast or time")
    if given:
        return Finding("t1c", evidence)
    return Finding("t1", evidence, assumed=not absent)


def _may_be_a_time(words: Sequence[str]) -> bool:
    """Whether the only word for contrast is a leading 'pre' or 'post': 'post_T1' may be after surgery."""
    contrast = [word for word in words if word in _WITH | _WITHOUT | _NEGATIONS]
    first = next(place for place, word in enumerate(words) if word in _T1_WORDS)
    return len(contrast) == 1 and contrast[0] in ("pre", "post") and contrast[0] in words[:first]


def _contrast(words: Sequence[str]) -> tuple[bool, bool]:
    """Whether there are words for contrast, and words for none.

    A negation inverts the next word, 'post op' is a time, and 'pre contrast' or 'post contrast' is one term.
    """
    pairs = set(itertools.pairwise(words))
    # 'with and without', 'w/wo': an examination with both.
    given = absent = {"with", "without"} <= set(words) or ("w", "wo") in pairs
    position = 0
    while position < len(words):
        word, following = words[position], words[position + 1] if position + 1 < len(words) else ""
        step = 1
        if word in ("post", "pre") and following in _EVENTS:
            step = 2
        elif word in _NEGATIONS and following in _WITH:
            absent, step = True, 2
        elif word in _WITHOUT:
            absent, step = True, 2 if word == "pre" and following in _WITH - {"post"} else 1
        elif word in _WITH:
            given = True
        position += step
    return given, absent


_ENHANCED: dict[str, Weighting] = {
    "T1": "t1",
    "T2": "t2",
    "FLUID_ATTENUATED": "flair",
    **dict.fromkeys(
        ("DIFFUSION", "FLOW_ENCODED", "PERFUSION", "PROTON_DENSITY", "STIR", "T2_STAR", "TOF"), "other"
    ),
}


def _by_times(acquisition: Acquisition) -> tuple[frozenset[Weighting] | None, str]:
    """The possible weightings (None for any), and a summary of the parameters."""
    if stated := _ENHANCED.get(acquisition.contrast.upper()):
        return frozenset([stated]), f"AcquisitionContrast {acquisition.contrast.upper()}"
    echo, repetition, inversion = acquisition.echo, acquisition.repetition, acquisition.inversion
    times = {"TE": echo, "TR": repetition, "TI": inversion}
    facts = ", ".join(f"{name} {value:g} ms" for name, value in times.items() if value)
    if "EP" in acquisition.kinds:
        return frozenset(["other"]), f"echo planar, {facts}"
    if echo is None or repetition is None or echo <= 0 or repetition <= 0:
        return None, facts
    if inversion and inversion >= 1500:
        # Cerebrospinal fluid is nulled at 1.6 to 2.9 s; a T1 inversion recovery has a short echo time.
        return frozenset(["flair"] if echo >= 50 else ["t1", "other"]), facts
    if inversion and 0 < inversion < 300:  # nulls fat
        return frozenset(["other"]), facts
    if inversion:
        return frozenset(["t1"] if echo <= 40 else ["other"]), facts
    if "GR" in acquisition.kinds and "SE" not in acquisition.kinds:  # gradient echo
        return frozenset(["t1", "other"] if echo <= 12 else ["other"]), facts
    if not acquisition.kinds and echo <= 12 and repetition <= 60:
        return frozenset(["t1", "other"]), facts
    if echo >= 60 and repetition >= 1500:
        # With a long repetition time it may also be a FLAIR whose header lacks the inversion time.
        return frozenset(["t2"] if repetition < 4000 else ["t2", "flair"]), facts
    if echo <= 40 and repetition <= 1200:
        return frozenset(["t1"]), facts
    if echo <= 40 and repetition >= 1800:
        return frozenset(["other", "t1"]), facts
    return None, facts
