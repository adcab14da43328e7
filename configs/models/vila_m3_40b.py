"""VILA-M3 40B (published, not released; VILA1.5-40b is its base): InternViT-6B and Yi-34B."""

from ml_collections import ConfigDict
from vilam3_jax.configs.models import assemble
from vilam3_jax.configs.models.parts import llms, towers

NEEDS_SLICE = True


def get_model() -> ConfigDict:
    """Returns the `model` section."""
    return assemble("vila_m3_40b", towers.intern_vit_6b_448(), llms.yi_34b(), template="hermes-2")
