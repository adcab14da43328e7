"""`findings`: calibrated probabilities of findings in one pass.

The answers yes and no of every finding of a film are scored after one prefix, which holds the image:
k findings cost one reading of the image and k short questions, and nothing is generated.
"""

from vilam3_jax.evals.protocol import Protocol, register

FINDINGS = register(
    Protocol(
        id="findings",
        version=1,
        items="yes_no_questions",
        split="",
        question_types=(),
        prompt="single_turn",
        parser="yes_no",
        parser_of_type=(),
        metric="auroc",
        max_new_tokens=1,
        description="Every question with the options yes and no, by the probabilities of both answers.",
        metrics=(
            "accuracy", "positive_f1", "average_precision", "brier", "brier_scaled", "ece", "ece_scaled",
            "nll", "nll_scaled", "aurc",
        ),
        aggregation="mean_of_types",
        answers="probabilities",
        arms=("model", "no_image", "majority"),
        contrasts=(("gain over the text alone", "model", "no_image"),),
    )
)  # fmt: skip
