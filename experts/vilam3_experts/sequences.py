"""Which MRI sequence a volume is: native or contrast-enhanced T1, T2 or FLAIR.

Two kinds of evidence are read. Words: the file's name, or the description of a DICOM series. Facts of the
acquisition: echo, repetition and inversion times, the kind of sequence and the contrast agent. Words and
facts that contradict each other, or words that name two sequences, give no role: nothing here is a guess.

A T1 without any sign of contrast counts as native, because files rarely say so; `Finding.assumed` tells.
That is harmless where the same case holds a T1 that does show contrast.

Descriptions may hold what identifies a patient. Findings therefore name only the words of our own lists.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pydicom

from vilam3_jax.data.dicom.headers import functional_group, naming, numbers
from vilam3_jax.runtime.paths import PathLike

Weighting = Literal["t1", "t2", "flair", "other"]
ROLES = ("t1c", "t1", "t2", "flair")


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a volume is, as far as the evidence goes.

    Attributes:
      role: one of `ROLES`; None if it is none of the four, or if that cannot be told.
      evidence: what was found, in words for people; no patient data.
      problem: why there is no role although the volume may be one of the four; '' otherwise.
      other: what it is instead, such as "a segmentation"; '' otherwise.
      assumed: a T1 that is taken as native only because nothing says that contrast was given.
    """

    role: str | None = None
    evidence: str = ""
    problem: str = ""
    other: str = ""
    assumed: bool = False


@dataclasses.dataclass(frozen=True)
class Acquisition:
    """What a header states of an MRI acquisition; None or '' where it does not.

    Attributes:
      texts: series description and protocol name.
      agent: the contrast agent as stored.
      contrast: AcquisitionContrast of an enhanced MR object, such as "T1" or "FLUID_ATTENUATED".
      kinds: values of ScanningSequence: SE, IR, GR, EP, RM.
      echo, repetition, inversion: times in milliseconds.
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
# 'post' and 'pre' before these tell the time of a scan, not its contrast.
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
_LINKS = _words("to in on reg registered coreg coregistered")  # 't1 to t1c': one in the space of another
_ACQUISITION_WORDS = _words("""
    ax axial tra trans transversal transverse sag sagittal cor coronal obl 3d 2d se tse fse tfe ffe gre space
    spc cube vista iso fs fatsat fat sat ir tirm dark fluid w wi weighted spin echo brain head cerebrum mri
    mr blade propeller vol volume image scan
""")
_WORDS = (
    _T1_WORDS | _FLAIR_WORDS | {"t2"} | _WITH | _WITHOUT | _SEGMENTATIONS | _OTHERS | _GRADIENT | _EVENT_WORDS
)
# The short names of BraTS and of the collections that follow it.
_SHORT = {
    "t1n": ("t1", "native"),
    "t1c": ("t1", "ce"),
    "t2f": ("t2", "flair"),
    "ct1": ("t1", "ce"),
    "cet1": ("t1", "ce"),
    "t1ca": ("t1", "ce"),
}
_PIECES = sorted(_WORDS | _ACQUISITION_WORDS | {"c", "n"}, key=len, reverse=True)
# Possessive: a long name that can be cut in many ways costs no backtracking.
_GLUED = re.compile(f"(?:{'|'.join(map(re.escape, _PIECES))})++")
_PIECE = re.compile("|".join(map(re.escape, _PIECES)))
_NO_AGENT = {"", "NONE", "NO", "N", "NA", "N/A", "NIL", "0", "FALSE", "WITHOUT", "UNKNOWN"}
_BIDS = re.compile(r"sub-[A-Za-z0-9]+(?:_[a-z]+-[A-Za-z0-9]+)*_(?P<suffix>[A-Za-z0-9]+)")
_BIDS_SUFFIXES = {"T1w": "t1", "T2w": "t2", "FLAIR": "flair"}
_ENDING = re.compile(r"(?:\.nii|\.nrrd|\.nhdr|\.mha|\.mhd|\.hdr|\.img|\.dcm)?(?:\.gz)?$", re.IGNORECASE)


def stem(name: str) -> str:
    """A file's name without the endings of volume files."""
    return _ENDING.sub("", name, count=1)


def split_words(text: str) -> list[str]:
    """The words of a name or description in lower case, with the short names of sequences written out.

    'T1+C' becomes t1, ce; 'axT2flair' ax, t2, flair; 't2*' t2star; 'T1 w/o contrast' t1, without, contrast.
    """
    text = text.lower().replace("t2*", " t2star ").replace("w/o", " without ").replace("+c", " ce ")
    text = re.sub(r"(?<![a-z0-9])c\+", " ce ", text)
    found: list[str] = []
    for token in re.findall("[a-z0-9]+", text):
        token = "seg" if re.fullmatch(r"seg\d+", token) else token
        found += _SHORT.get(token) or _pieces(token)
    return found


def _pieces(token: str) -> list[str]:
    """A token that is nothing but known words glued together, in pieces; any other one as it is."""
    if token in _WORDS or token in _ACQUISITION_WORDS or not _GLUED.fullmatch(token):
        return [token]
    pieces: list[str] = _PIECE.findall(token)
    # A lone letter means something only behind T1: t1c, t1wc, t1n.
    if any(piece in ("c", "n") for piece in pieces) and pieces[0] != "t1":
        return [token]
    meant = {"c": "ce", "n": "native"}
    return [meant.get(piece, piece) for piece in pieces]


def without_sequence(text: str) -> str:
    """What remains of a name without the words that tell sequences and how they were acquired.

    Names of one case differ only in those words: the rest tells which files belong together.
    """
    dropped = _WORDS | _ACQUISITION_WORDS | _NEGATIONS | _LINKS
    return "_".join(word for word in split_words(stem(text)) if word not in dropped)


def bids_case(name: str) -> str | None:
    """Subject and session of a BIDS file name, 'sub-01_ses-1'; None for any other name."""
    if not _BIDS.fullmatch(stem(name)):
        return None
    return "_".join(part for part in stem(name).split("_") if part.startswith(("sub-", "ses-")))


def from_name(name: str) -> Finding:
    """Recognises the sequence by a file's name.

    Knows BIDS (the suffix, and the entity `ce-` or `acq-` for contrast), the names of BraTS since 2012
    (t1ce, t1c, t1gd, t1n, t2w, t2f, flair) and those of the collections that hospitals and archives write.
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
    if stated and not words:  # ce- names the agent, whatever it is called
        words = ["ce"]
    if "none" in words:
        words = ["native"]
    return _from_words([weighting, *words], "its BIDS name")


def from_acquisition(acquisition: Acquisition) -> Finding:
    """Recognises the sequence by what a header states.

    The times are those of clinical field strengths, 1 to 3 T. They only narrow down: gradient echoes with a
    short echo are T1 or angiographies, so words must decide there.
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
    if weighting == "t2" or weighting == "flair":
        return Finding(weighting, evidence)
    if words.role == "t1c":
        return Finding("t1c", evidence)
    if words.role == "t1" and not words.assumed:
        if agent:
            return Finding(evidence=evidence, problem="described as native, but a contrast agent is recorded")
        return Finding("t1", evidence)
    return Finding("t1c", evidence) if agent else Finding("t1", evidence, assumed=True)


def from_dicom(header: pydicom.Dataset, path: PathLike) -> Finding:
    """`from_acquisition` of a DICOM header, classic or enhanced MR.

    Args:
      header: as `dicom.headers.read_mr_header` returns it.
      path: to name in errors.

    Raises:
      UserError: a damaged header.
    """
    with naming(path):
        return from_acquisition(_acquisition(header))


def from_sidecar(sidecar: Mapping[str, Any]) -> Finding:
    """`from_acquisition` of a BIDS JSON sidecar, whose times are seconds."""

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
    """What the first text says that says anything.

    A later one only tells whether a T1 has contrast, and only if it speaks of a T1 itself: protocol names are
    often those of the whole examination ("brain with and without contrast").
    """
    findings = [_from_words(split_words(text), "its description") for text in texts]
    telling = [found for found in findings if found.role or found.problem or found.other]
    if not telling:
        return next((found for found in findings if found.evidence), Finding())
    first = telling[0]
    if first.role == "t1" and first.assumed:
        return next((found for found in telling if found.role in ("t1", "t1c") and not found.assumed), first)
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


_T1_FLAIR = re.compile(r"\bt1 (?:w |weighted )?flair\b")  # a T1 with an inversion, not a FLAIR


def _is_in_space_of_another(words: Sequence[str]) -> bool:
    """Whether a link such as 'to' stands between two sequences."""
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
    if (given or absent) and where == "its name" and _is_perhaps_a_time(words):
        return Finding(
            evidence=evidence, problem=f"{where} says pre or post before T1, of contrast or of time"
        )
    if given:
        return Finding("t1c", evidence)
    return Finding("t1", evidence, assumed=not absent)


def _is_perhaps_a_time(words: Sequence[str]) -> bool:
    """Whether contrast is told by nothing but a 'pre' or 'post' in front: 'post_T1' may be after surgery."""
    telling = [word for word in words if word in _WITH | _WITHOUT | _NEGATIONS]
    first = next(place for place, word in enumerate(words) if word in _T1_WORDS)
    return len(telling) == 1 and telling[0] in ("pre", "post") and telling[0] in words[:first]


def _contrast(words: Sequence[str]) -> tuple[bool, bool]:
    """(words for contrast, words for none); a negation turns the next word round, 'post op' is a time.

    'pre contrast' is one statement, and so is 'post contrast'.
    """
    pairs = set(itertools.pairwise(words))
    # 'with and without', 'w/wo': an examination that had both.
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
    "DIFFUSION": "other",
    "FLOW_ENCODED": "other",
    "PERFUSION": "other",
    "PROTON_DENSITY": "other",
    "STIR": "other",
    "T2_STAR": "other",
    "TOF": "other",
}


def _by_times(acquisition: Acquisition) -> tuple[frozenset[Weighting] | None, str]:
    """What the acquisition can be, None for anything; and the facts for people."""
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
        # Cerebrospinal fluid is nulled at 1.6 to 2.9 s; a T1 inversion recovery has a short echo.
        return frozenset(["flair"] if echo >= 50 else ["t1", "other"]), facts
    if inversion and 0 < inversion < 300:  # nulls fat
        return frozenset(["other"]), facts
    if inversion:
        return frozenset(["t1"] if echo <= 40 else ["other"]), facts
    gradient = "GR" in acquisition.kinds and "SE" not in acquisition.kinds
    if gradient:
        return frozenset(["t1", "other"] if echo <= 12 else ["other"]), facts
    if not acquisition.kinds and echo <= 12 and repetition <= 60:
        return frozenset(["t1", "other"]), facts
    if echo >= 60 and repetition >= 1500:
        # A long repetition without an inversion time may also be a FLAIR whose header lacks it.
        return frozenset(["t2"] if repetition < 4000 else ["t2", "flair"]), facts
    if echo <= 40 and repetition <= 1200:
        return frozenset(["t1"]), facts
    if echo <= 40 and repetition >= 1800:
        return frozenset(["other", "t1"]), facts
    return None, facts
