"""Sample dialogues of the report: which ones are shown, and their pictures."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vilam3_jax.report import runs

Row = Mapping[str, Any]

PLAN = (
    ("stage4_experts", 7),
    ("stage4_falsified", 3),
    ("stage4_no_experts", 1),
    ("stage3", 1),
)
"""Arm and how many of its dialogues are shown."""


@dataclasses.dataclass(frozen=True)
class Pictures:
    """What a dialogue is shown with.

    Attributes:
      image: PNG of the slice or film, or None.
      image_words: what it is.
      overlay: PNG of the same slice with the expert's labels, or None.
      overlay_words: what that is.
      legend: (CSS colour, name) of the labels on the slice.
    """

    image: bytes | None = None
    image_words: str = ""
    overlay: bytes | None = None
    overlay_words: str = ""
    legend: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """One answered question, ready to be drawn.

    Attributes:
      arm: which arm answered.
      kind_words: modality, type of question, and whether it is an oracle question.
      question: as asked.
      trigger: the expert call that the model wrote, or empty.
      expert_words: what the model was shown of the expert's result, or empty.
      falsified: that result is wrong on purpose.
      answer: as the model wrote it.
      gold: the right answer.
      correct: how it was scored.
      image, image_words, overlay, overlay_words, legend: as in `Pictures`.
    """

    arm: str
    kind_words: str
    question: str
    trigger: str
    expert_words: str
    falsified: bool
    answer: str
    gold: str
    correct: bool
    image: bytes | None = None
    image_words: str = ""
    overlay: bytes | None = None
    overlay_words: str = ""
    legend: tuple[tuple[str, str], ...] = ()


def choose(arms: Sequence[runs.Arm], plan: Sequence[tuple[str, int]] = PLAN) -> list[Row]:
    """Picks rows for variety, by a rule that does not ask whether they look good.

    One after the other, the row is taken whose modality, question type, outcome and expert call have been
    shown least so far; ties go by the hash of the item. Falsified rows prefer items that are shown with the
    true expert.

    Returns:
      Rows in the order of the plan; fewer where an arm has fewer.
    """
    by_name = {arm.name: arm.rows for arm in arms}
    shown: collections.Counter[Any] = collections.Counter()
    taken: dict[str, set[str]] = {}
    out: list[Row] = []
    for arm, count in plan:
        left = list(by_name.get(arm, []))
        before = set().union(*taken.values()) if taken else set()
        for _ in range(min(count, len(left))):
            best = min(left, key=lambda row: (*_seen(row, arm, shown, before), _hash(row["item"])))
            left.remove(best)
            shown.update(_features(best, arm))
            taken.setdefault(arm, set()).add(best["item"])
            out.append(best)
    return out


def _features(row: Row, arm: str) -> list[tuple[str, ...]]:
    return [
        ("modality", arm, str(row.get("modality"))),
        ("modality", str(row.get("modality"))),
        ("type", str(row["question_type"])),
        ("type", arm, str(row["question_type"])),
        ("outcome", arm, str(bool(row["correct"]))),
        ("called", arm, str(row.get("expert_called") or "")),
        ("volume", str(row["cluster"])),
    ]


def _seen(row: Row, arm: str, shown: Mapping[Any, int], before: set[str]) -> tuple[int, int]:
    # An arm whose point is the expert's word says nothing where no expert was called.
    silent = arm in ("stage4_experts", "stage4_falsified") and not row.get("trigger")
    again = 0 if arm == "stage4_falsified" and row["item"] in before else 2
    return sum(shown[feature] for feature in _features(row, arm)) + again + 4 * silent, 0


def _hash(item: object) -> str:
    return hashlib.sha256(str(item).encode()).hexdigest()


def dialogues(rows: Iterable[Row], pictures: Callable[[Row], Pictures]) -> list[Dialogue]:
    """Makes dialogues of chosen rows.

    Args:
      rows: as from `choose`; read are `question`, `gold`, `output`, `trigger`, `expert_text`, `modality`.
      pictures: finds the pictures of a row.
    """
    out = []
    for row in rows:
        kind = [str(row.get("modality") or ""), str(row["question_type"]).replace("_", " ")]
        if row["oracle"]:
            kind.append("oracle question")
        out.append(
            Dialogue(
                arm=str(row["arm"]),
                kind_words=", ".join(part for part in kind if part),
                question=str(row.get("question") or ""),
                trigger=str(row.get("trigger") or ""),
                expert_words=str(row.get("expert_text") or ""),
                falsified=row.get("falsify_seed") is not None,
                answer=str(row.get("output") or ""),
                gold=str(row.get("gold") or ""),
                correct=bool(row["correct"]),
                **{
                    f.name: getattr(found, f.name)
                    for found in [pictures(row)]
                    for f in dataclasses.fields(found)
                },
            )
        )
    return out
