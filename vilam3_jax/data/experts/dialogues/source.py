"""A dataset under a rule: the records that the rule fits, and the dialogue of each at a place of the stream.

This module imports neither jax nor flax nor torch.
"""

from __future__ import annotations

import collections
import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vilam3_jax.data.examples import Example
from vilam3_jax.data.experts.dialogues.pools import pools_digest
from vilam3_jax.data.experts.dialogues.rules import Rule
from vilam3_jax.data.experts.dialogues.scene import Scene, Setting, Unfit
from vilam3_jax.data.records import ExampleSource
from vilam3_jax.errors import UnavailableError, UserError

_NAMED = 3


class DialogueSource:
    """Reads like an `ExampleSource`, of the records that a rule fits; `dialogue` makes an example of one.

    Attributes:
      rule: of the dialogues.
      info: of the dataset, with the rule and what it left out in `provenance`.
      left_out: reason, with the first record it holds for, to the number of records that do not fit.
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
        """The dataset's name and the rule's, as in the mixture."""
        return f"{self._source.name}:{self.rule.name}"

    def digests(self) -> list[str]:
        """What a place in the stream depends on: the records, which of them, and the questions."""
        made = hashlib.sha256(self._kept.tobytes())
        made.update(f"{pools_digest()} {self._setting.parity} {self._setting.min_lesion_ml} ".encode())
        made.update(f"{self._setting.style.threshold}".encode())
        return [*self._source.digests(), made.hexdigest()]

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Example:
        """The record as it is stored.

        Raises:
          What `ExampleSource` raises.
        """
        return self._source[int(self._kept[index])]

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def find(self, example_id: str) -> int:
        """As of `ExampleSource`, among the records that the rule fits.

        Raises:
          UserError: there is none.
        """
        for index, example in enumerate(self):
            if example_id in (example.id, f"{example.id}:{self.rule.name}"):
                return index
        raise UserError(
            f"{self.directory}: no example {example_id!r} that {self.rule.name} fits; check the id"
        )

    def dialogue(self, index: int, position: int, experts: bool) -> Example:
        """The dialogue of a record at a position of the stream: the same whenever it is asked for.

        Args:
          index: of the record.
          position: in the order of samples.
          experts: whether they are on there.

        Raises:
          UserError: the record has none after all, say by too small a lesion on its slice.
        """
        record = int(self._kept[index])
        scene = Scene(
            self._source[record], self._setting, _generator(self._seed, self.name, record, position), experts
        )
        try:
            return self.rule.make(scene)
        except Unfit as reason:
            raise UserError(f"rule {self.rule.name}: {reason}") from None


def under_rules(
    source: ExampleSource, rules: Sequence[Rule], setting: Setting, seed: int
) -> list[DialogueSource]:
    """Finds out which records each rule fits; reads every record once.

    Args:
      source: the dataset.
      rules: to try.
      setting: what dialogues are made with.
      seed: of the dialogues.

    Raises:
      UserError: a rule that the reference does not have, under `parity`.
    """
    for rule in rules:
        if setting.parity and rule.parity is None:
            raise UserError(
                f"config data.dialogue_parity: the reference has no dialogues of the rule {rule.name}; "
                "remove its row of data.mixture or set data.dialogue_parity=False"
            )
    kept: list[list[int]] = [[] for _ in rules]
    left: list[collections.Counter[str]] = [collections.Counter() for _ in rules]
    first_of: dict[str, str] = {}
    for number in range(len(source)):
        name, unfit = _unfit(source, number, rules, setting)
        for rule, reason, indices, reasons in zip(rules, unfit, kept, left, strict=True):
            if reason is None:
                indices.append(number)
            else:
                reasons[reason] += 1
                first_of.setdefault(f"{rule.name} {reason}", name)
    made = []
    for rule, indices, reasons in zip(rules, kept, left, strict=True):
        named = {
            f"{why} (first: {first_of[f'{rule.name} {why}']})": count for why, count in reasons.most_common()
        }
        made.append(DialogueSource(source, rule, setting, seed, np.array(indices, np.int64), named))
    return made


def _unfit(
    source: ExampleSource, number: int, rules: Sequence[Rule], setting: Setting
) -> tuple[str, list[str | None]]:
    """(name of a record, why it does not fit each rule); a record that cannot be used fits none.

    Raises:
      UnavailableError: the data cannot be read now.
    """
    name = f"record {number}"
    try:
        record = source[number]
        if problem := record.problem():
            return name, [f"cannot be used: {problem}"] * len(rules)
        name = record.id
        scene = Scene(record, setting, random.Random(0))
        return name, [rule.unfit(scene) for rule in rules]
    except (UnavailableError, MemoryError):
        raise
    except Exception as error:  # whatever is wrong in a record, the others are tried
        return name, [f"cannot be used ({type(error).__name__})"] * len(rules)


def under_rule(source: ExampleSource, rule: Rule, setting: Setting, seed: int) -> DialogueSource:
    """All records under a rule, whether it fits them or not, numbered as they are stored."""
    return DialogueSource(source, rule, setting, seed, np.arange(len(source)), {})


def why_left_out(source: DialogueSource) -> str:
    """The reasons in a sentence, the most frequent first; '' if every record fits."""
    reasons = list(source.left_out.items())
    told = [f"{count} {'records' if count > 1 else 'record'}: {why}" for why, count in reasons[:_NAMED]]
    if more := len(reasons) - len(told):
        told.append(f"{more} more reason{'s' if more > 1 else ''}")
    return "; ".join(told)


def _generator(seed: int, name: str, record: int, position: int) -> random.Random:
    digest = hashlib.sha256(f"{seed}/{name}/{record}/{position}".encode()).digest()
    return random.Random(int.from_bytes(digest[:16], "big"))


def dialogue_of(source: Any, index: int, position: int, experts: bool) -> Example:
    """The example of a record: its dialogue under a rule, or the record itself."""
    if isinstance(source, DialogueSource):
        return source.dialogue(index, position, experts).validate()
    return source[index].validate()
