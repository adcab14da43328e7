"""A dataset under a rule: the records that the rule fits, and their dialogues at positions of the stream."""

from __future__ import annotations

import collections
import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vilam3_jax.data.examples import Example
from vilam3_jax.data.experts.dialogues.phrases import pools_digest
from vilam3_jax.data.experts.dialogues.rules import Rule
from vilam3_jax.data.experts.dialogues.scene import Scene, Setting, Unfit
from vilam3_jax.data.records import ExampleSource
from vilam3_jax.errors import UnavailableError, UserError

_MAX_REASONS = 3


class DialogueSource:
    """The records of an `ExampleSource` that a rule fits; `dialogue` builds an example from one.

    Attributes:
      rule: the rule.
      info: the dataset's info, with the rule and the omitted records in `provenance`.
      left_out: maps a reason, with the first record it applies to, to the number of omitted records.
    """

    def __init__(
        self,
        source: ExampleSource,
        rule: Rule,
        setting: Setting,
        seed: int,
        kept: np.ndarray,
        left_out: dict[str, int],
    ) -> None:
        """See `under_rules`."""
        self._source, self.rule, self._setting, self._seed = source, rule, setting, seed
        self._kept, self.left_out = kept, left_out
        made = {"rule": rule.name, "parity": setting.parity, "left_out": left_out}
        self.info = {**source.info, "provenance": {**source.info.get("provenance", {}), "dialogues": made}}
        self.directory, self.data_root, self.split = source.directory, source.data_root, source.split

    @property
    def name(self) -> str:
        """`NAME:RULE`, as in the mixture."""
        return f"{self._source.name}:{self.rule.name}"

    def digests(self) -> list[str]:
        """Digests of everything that determines a position: the data, the kept records, the questions."""
        made = hashlib.sha256(self._kept.tobytes())
        made.update(f"{pools_digest()} {self._setting.parity} {self._setting.min_lesion_ml} ".encode())
        made.update(f"{self._setting.style.threshold}".encode())
        return [*self._source.digests(), made.hexdigest()]

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Example:
        """Returns the stored record; raises as `ExampleSource`."""
        return self._source[int(self._kept[index])]

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def find(self, example_id: str) -> int:
        """Returns the index of a record or dialogue id; raises `UserError` if there is none."""
        for index, example in enumerate(self):
            if example_id in (example.id, f"{example.id}:{self.rule.name}"):
                return index
        raise UserError(
            f"{self.directory}: no example {example_id!r} that {self.rule.name} fits; check the id"
        )

    def dialogue(self, index: int, position: int, experts: bool) -> Example:
        """Returns the dialogue of a record at a position of the stream, which determines it.

        Raises `UserError` if there is none, for example because a lesion is too small on the slice.
        """
        record = int(self._kept[index])
        seed = hashlib.sha256(f"{self._seed}/{self.name}/{record}/{position}".encode()).digest()
        rng = random.Random(int.from_bytes(seed[:16], "big"))
        try:
            return self.rule.make(Scene(self._source[record], self._setting, rng, experts))
        except Unfit as reason:
            raise UserError(f"rule {self.rule.name}: {reason}") from None


def under_rules(
    source: ExampleSource, rules: Sequence[Rule], setting: Setting, seed: int
) -> list[DialogueSource]:
    """Determines which records each rule fits; reads every record once. `seed` determines the dialogues.

    Raises `UserError` if the reference lacks a rule under `parity`.
    """
    for rule in rules:
        if setting.parity and rule.parity is None:
            raise UserError(
                f"config data.dialogue_parity: the reference has no dialogues of the rule {rule.name}; "
                "remove its row of data.mixture or set data.dialogue_parity=False"
            )
    kept: list[list[int]] = [[] for _ in rules]
    reasons: list[collections.Counter[str]] = [collections.Counter() for _ in rules]
    first_of: dict[tuple[int, str], str] = {}
    for index in range(len(source)):
        name, unfit = _unfit(source, index, rules, setting)
        for number, reason in enumerate(unfit):
            if reason is None:
                kept[number].append(index)
            else:
                reasons[number][reason] += 1
                first_of.setdefault((number, reason), name)
    made = []
    for number, rule in enumerate(rules):
        left_out = {
            f"{reason} (first: {first_of[number, reason]})": count
            for reason, count in reasons[number].most_common()
        }
        made.append(DialogueSource(source, rule, setting, seed, np.array(kept[number], np.int64), left_out))
    return made


def _unfit(
    source: ExampleSource, index: int, rules: Sequence[Rule], setting: Setting
) -> tuple[str, list[str | None]]:
    """(name of a record, why each rule does not fit it or None). No rule fits a bad record."""
    name = f"record {index}"
    try:
        record = source[index]
        if problem := record.problem():
            return name, [f"cannot be used: {problem}"] * len(rules)
        name = record.id
        scene = Scene(record, setting, random.Random(0))
        return name, [rule.unfit(scene) for rule in rules]
    except (UnavailableError, MemoryError):
        raise
    except Exception as error:  # a bad record must not stop the others
        return name, [f"cannot be used ({type(error).__name__})"] * len(rules)


def why_left_out(source: DialogueSource) -> str:
    """The reasons in a sentence, the most frequent first; '' if every record fits."""
    reasons = list(source.left_out.items())
    listed = [
        f"{count} {'records' if count > 1 else 'record'}: {why}" for why, count in reasons[:_MAX_REASONS]
    ]
    if more := len(reasons) - len(listed):
        listed.append(f"{more} more reason{'s' if more > 1 else ''}")
    return "; ".join(listed)


def dialogue_of(source: Any, index: int, position: int, experts: bool) -> Example:
    """The dialogue of a record under a rule, or the record itself without a rule."""
    if isinstance(source, DialogueSource):
        return source.dialogue(index, position, experts).validate()
    return source[index].validate()
