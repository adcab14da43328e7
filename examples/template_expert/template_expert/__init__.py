"""The descriptor: what is known of the expert without running it. Import no heavy library here."""

from vilam3_experts.descriptors import Descriptor

from vilam3_jax.data.experts.cards import Card

BODY = Descriptor(
    card=Card(
        name="BODY",
        args=("body", "air"),
        modality="CT",
        task="segmentation",
        overview="what is denser than air, by a threshold",
        accuracy="not measured",
        modalities=("CT",),
    ),
    version="0.1.0",
    input="volume",
    kind="segmentation",
    factory="template_expert.model:Body",
)
