"""Checks of an expert's inputs: is this a scan that the expert supports?"""

from __future__ import annotations

from collections.abc import Sequence

from vilam3_jax.data.experts.cards import Card
from vilam3_jax.data.experts.record import Verdict
from vilam3_jax.data.experts.verify.evidence import Evidence


def check_input(card: Card, evidence: Sequence[Evidence]) -> tuple[Verdict, ...]:
    """Judges every input by the requirements of the card.

    Args:
      card: its `modalities` and `regions`; empty ones require nothing.
      evidence: evidence of each input, in order.

    Returns:
      For each input, a verdict `modality` and a verdict `region`, where the card has requirements: 'pass',
      'fail', or 'unknown' without evidence. Also a verdict `intensities`, 'warn', if the values contradict
      the stated modality. The subject is the role of the input.
    """
    found = []
    for one in evidence:
        if card.modalities:
            found.append(_modality(card, one))
            if found[-1].status == "pass":
                found += _intensities(one)
        if card.regions:
            found.append(_region(card, one))
    return tuple(found)


def refusal(card: Card, verdicts: Sequence[Verdict]) -> str | None:
    """A sentence on why the expert must not run, or None if it may."""
    failed = [v for v in verdicts if v.stage == "before" and v.status == "fail"]
    if not failed:
        return None
    reasons = "; ".join(dict.fromkeys(v.message for v in failed))
    from_voxels = any(v.check == "region" or "values" in v.message for v in failed)
    state = "state what it is, or " if from_voxels else ""
    return f"{card.name} was not run: {reasons}; {state}choose another scan or expert"


def _verdict(check: str, status: str, one: Evidence, message: str = "") -> Verdict:
    of_role = f"{one.role}: {message}" if one.role and message else message
    return Verdict(check, status, "before", one.role, message=of_role)


def _modality(card: Card, one: Evidence) -> Verdict:
    wanted = " or ".join(card.modalities)
    if one.stated_modality is not None:
        if one.stated_modality in card.modalities:
            return _verdict("modality", "pass", one)
        why = f"the image is {one.stated_modality}, and {card.name} reads {wanted}"
    elif "CT" not in card.modalities and one.values == "hounsfield":
        why = f"the values are those of a CT, and {card.name} reads {wanted}"
    elif card.modalities == ("CT",) and one.values == "not hounsfield":
        why = f"the values are no Hounsfield units, and {card.name} reads CT"
    else:
        return _verdict("modality", "unknown", one, "nothing states the modality of the image")
    return _verdict("modality", "fail", one, why)


def _intensities(one: Evidence) -> list[Verdict]:
    if one.stated_modality == "CT" and one.values == "not hounsfield":
        why = "the image is stated to be CT, and its values are no Hounsfield units"
    elif one.stated_modality not in (None, "CT") and one.values == "hounsfield":
        why = f"the image is stated to be {one.stated_modality}, and its values are those of a CT"
    else:
        return []
    return [_verdict("intensities", "warn", one, why)]


def _region(card: Card, one: Evidence) -> Verdict:
    wanted = " or ".join(card.regions)
    if one.stated_regions:
        if one.stated_regions & set(card.regions):
            return _verdict("region", "pass", one)
        stated = " or ".join(sorted(one.stated_regions))
        why = f"the image shows the {stated}, and {card.name} reads the {wanted}"
    elif card.regions == ("head",) and one.exceeds_head:
        area = f"{one.smallest_section_cm2:.0f} cm²"
        why = f"the body measures {area} across even where it is small, which is no {wanted}"
    else:
        return _verdict("region", "unknown", one, "nothing states the body region of the image")
    return _verdict("region", "fail", one, why)
