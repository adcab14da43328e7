"""The protocol of the quickstart."""

from vilam3_jax.evals import protocol

QUICKSTART = protocol.register(
    protocol.Protocol(
        id="quickstart",
        version=1,
        items="qa_of_dialogues",
        split="heldout",
        question_types=(),
        prompt="single_turn",
        parser="by_options",
        parser_of_type=(("which_organs", "subset"),),
        metric="accuracy",
        max_new_tokens=48,
        # Part of the hash, so it stays as it is.
        description=(
            "Every question of every held-out dialogue, asked alone about its image, greedy decoding. "
            "Strict reading: yes or no must be the first word, an option must stand at the start."
        ),
    )
)
