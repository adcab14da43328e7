"""`grounding`: does the answer depend on the image?

The same questions with the true image, a grey one, another patient's of the same modality, the answer's
region hidden, and no image. The differences are called visual reliance and image sensitivity in arXiv
2603.03437: a model that answers as well without the image does not look at it.
"""

from vilam3_jax.evals.protocol import Protocol, register

GROUNDING = register(
    Protocol(
        id="grounding",
        version=1,
        items="qa_of_dialogues",
        split="",
        question_types=(),
        prompt="single_turn",
        parser="by_options",
        parser_of_type=(("which_organs", "subset"),),
        metric="accuracy",
        max_new_tokens=48,
        description="Every question with the true image, changed images, and without image; no experts.",
        arms=("model", "blank", "other_patient", "region_hidden", "no_image", "majority"),
        contrasts=(
            ("visual reliance", "model", "blank"),
            ("reliance on this patient's image", "model", "other_patient"),
            ("reliance on the region", "model", "region_hidden"),
            ("gain over the text alone", "model", "no_image"),
            ("gain over the most frequent answer", "model", "majority"),
        ),
    )
)
