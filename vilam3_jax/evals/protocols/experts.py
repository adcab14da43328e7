"""`experts`: does the model call the right expert for this image, and does the answer get better?

The pair "same question, other image": a question whose expert reads another modality than the image shown
must call none. `experts_falsified` shows the harm of an expert that lies, `experts_failing` of one that
fails.
"""

from vilam3_jax.evals.protocol import Protocol, register

EXPERTS = register(
    Protocol(
        id="experts",
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
            "Every question with experts, without, with falsified and with failing experts, and about an "
            "image of another modality. Calls are those of the model's first turn."
        ),
        metrics=("call_recall", "call_precision", "calls_without_need", "calls_of_the_asked_kind"),
        arms=(
            "experts",
            "model",
            "experts_falsified",
            "experts_failing",
            "experts_other_modality",
            "no_image",
            "majority",
        ),
        contrasts=(
            ("gain from experts", "experts", "model"),
            ("harm of experts that lie", "experts_falsified", "model"),
            ("harm of experts that fail", "experts_failing", "model"),
        ),
    )
)
