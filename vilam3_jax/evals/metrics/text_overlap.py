"""Words that an answer shares with the right answer."""

from __future__ import annotations

from collections import Counter

from vilam3_jax.evals.metrics.base import Row, ratio, register
from vilam3_jax.evals.metrics.question_kinds import (
    NO,
    YES,
    is_closed,
    is_open,
    mean_over_groups,
    mean_where,
    numbers_where,
    question_type,
)
from vilam3_jax.evals.parsers.published import normalise_word


def token_f1(parsed: str | None, gold: str) -> float:
    """F1 of the multisets of words (Rajpurkar et al., 2016); 0 for an unparsed answer."""
    said, right = Counter((parsed or "").split()), Counter(gold.split())
    both = (said & right).total()
    return 2 * both / (said.total() + right.total()) if both else 0.0


def vqa_recall(parsed: str | None, gold: str) -> float:
    """Recall of words as LLaVA-Med and VILA-M3 compute it (`calculate_f1score`); 0 for an unparsed answer.

    Both texts are normalised a second time. Shared words count as often as the answer says them, missed words
    as often as the right answer does: 'left left lung' of 'left lobe' has a recall of 2/3, not 1/2.
    """
    said = Counter(normalise_word(parsed or "").split())
    right = Counter(normalise_word(gold).split())
    shared = sum(count for word, count in said.items() if word in right)
    missed = sum(count for word, count in right.items() if word not in said)
    return shared / (shared + missed) if shared else 0.0


def _token_f1(row: Row) -> float:
    return token_f1(row["parsed"], row["gold"])


def _vqa_recall(row: Row) -> float:
    return vqa_recall(row["parsed"], row["gold"])


def _is_yes_no(row: Row) -> bool:
    return row["gold"] in (YES, NO)


def _contains(row: Row) -> float:
    """Whether a closed answer with 'yes' or 'no' in it contains the right one, as a part of any word."""
    said = row["parsed"] or ""
    return float(_has_yes_no(row) and row["gold"] in said)


def _has_yes_no(row: Row) -> bool:
    return any(word in (row["parsed"] or "") for word in (YES, NO))


def _is_counted(row: Row) -> bool:
    """Whether LLaVA-Med's script counts a closed question at all.

    It adds 0 only if the answer contains neither 'yes' nor 'no'; a wrong one of the two is left out.
    """
    return is_closed(row) and not (_has_yes_no(row) and not _contains(row))


register(mean_where("token_f1", _token_f1, lambda row: True))
register(mean_where("yes_no_accuracy", lambda row: float(row["correct"]), _is_yes_no))
register(mean_where("open_recall", _vqa_recall, is_open))
register(
    mean_over_groups("macro_open_recall", question_type, numbers_where(_vqa_recall, is_open), ratio, size=2)
)
register(mean_where("llava_med_closed_accuracy", _contains, is_closed))
register(mean_where("llava_med_closed_accuracy_as_released", _contains, _is_counted))
