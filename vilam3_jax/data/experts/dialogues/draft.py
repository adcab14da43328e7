"""A dialogue while it is made: turns, requests, and at the end an ordinary example.

This module imports neither jax nor flax nor torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from vilam3_jax.data.examples import Example, ExpertRequest, Turn
from vilam3_jax.data.experts.dialogues.scene import Finding, Scene


class Draft:
    """Turns and requests of one dialogue; `example` ends it."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._turns: list[Turn] = []
        self._requests: list[ExpertRequest] = []

    def exchange(self, question: str, answer: str, called: Sequence[Finding] = ()) -> Draft:
        """Adds a question and its answer.

        Args:
          question: without image markers; the images stand before the first one.
          answer: of the model, a target.
          called: experts that are called between the two; nobody with experts off.
        """
        shown = "" if self._turns else self._scene.shown
        return self.verbatim(shown + question, answer, called, question)

    def verbatim(
        self, user: str, answer: str, called: Sequence[Finding] = (), question: str = "", call: str = ""
    ) -> Draft:
        """`exchange` whose user turn is given with its markers.

        Args:
          user: text of the user's turn.
          answer: as in `exchange`.
          called: as in `exchange`.
          question: what the expert's turn repeats.
          call: words of the calling turn; '' for those of the style.
        """
        before = len(self._turns) + 1
        if self._scene.spoken:
            for finding in called:
                self._requests.append(
                    ExpertRequest(
                        finding.card.name, finding.args, finding.images, before, "always", question, call
                    )
                )
        self._turns += [Turn("user", user), Turn("assistant", answer, True)]
        return self

    def example(self, rule: str, **meta: object) -> Example:
        """The dialogue as an example.

        Args:
          rule: that made it; part of the id.
          meta: more values for `Example.meta`.
        """
        record = self._scene.record
        return dataclasses.replace(
            record,
            id=f"{record.id}:{rule}",
            format="conversation",
            turns=tuple(self._turns),
            expert_requests=tuple(self._requests),
            meta={**record.meta, "rule": rule, **meta},
        )
