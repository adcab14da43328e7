"""A dialogue under construction."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from vilam3_jax.data.examples import Example, ExpertRequest, Turn
from vilam3_jax.data.experts.dialogues.scene import Scene, StoredResult


class Draft:
    """Collects the turns and expert requests of a dialogue; `example` returns the result."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._turns: list[Turn] = []
        self._requests: list[ExpertRequest] = []

    def add(self, question: str, answer: str, called: Sequence[StoredResult] = ()) -> Draft:
        """Adds a question and its answer.

        Args:
          question: without image markers, which are put before the first question.
          answer: the model's answer, a target.
          called: results of the experts called between the two; ignored with experts off.
        """
        markers = "" if self._turns else self._scene.markers
        return self.add_verbatim(markers + question, answer, called, question)

    def add_verbatim(
        self, user: str, answer: str, called: Sequence[StoredResult] = (), question: str = "", call: str = ""
    ) -> Draft:
        """`add` with a given user turn.

        Args:
          user: text of the user's turn, with image markers.
          answer: as in `add`.
          called: as in `add`.
          question: the question that the expert's turn repeats.
          call: text of the calling turn; '' for that of the style.
        """
        before = len(self._turns) + 1
        if self._scene.experts_on:
            self._requests += [
                ExpertRequest(r.card.name, r.args, r.images, before, "always", question, call) for r in called
            ]
        self._turns += [Turn("user", user), Turn("assistant", answer, True)]
        return self

    def example(self, rule: str, **meta: object) -> Example:
        """Returns the dialogue as an example; `rule` becomes part of the id, `meta` extends the record's."""
        record = self._scene.record
        return dataclasses.replace(
            record,
            id=f"{record.id}:{rule}",
            format="conversation",
            turns=tuple(self._turns),
            expert_requests=tuple(self._requests),
            meta={**record.meta, "rule": rule, **meta},
        )
