"""`robustness`: do answers survive changes that do not change the truth?"""

from vilam3_jax.evals.protocol import Protocol, register

_CHANGES = ("framed", "polite", "options_reversed", "jpeg", "rotated", "wider_window")

ROBUSTNESS = register(
    Protocol(
        id="robustness",
        version=1,
        items="qa_of_dialogues",
        split="",
        question_types=(),
        prompt="single_turn",
        parser="by_options",
        parser_of_type=(("which_organs", "subset"),),
        metric="accuracy",
        max_new_tokens=48,
        description=(
            "Every question as it is; in two other frames; with reversed options where the question lists "
            "them; with the image as a JPEG of quality 20, rotated by 10 degrees, and with 0.6 of its "
            "contrast."
        ),
        arms=("model", *_CHANGES),
        contrasts=tuple((f"effect of {name.replace('_', ' ')}", name, "model") for name in _CHANGES),
    )
)
