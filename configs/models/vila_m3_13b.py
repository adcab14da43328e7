"""VILA-M3 13B (MONAI/Llama3-VILA-M3-13B): SigLIP at 384 pixels and Vicuna-13B."""

from ml_collections import ConfigDict
from vilam3_jax.configs.models import assemble
from vilam3_jax.configs.models.parts import llms, towers

NEEDS_SLICE = True


def get_model() -> ConfigDict:
    """Returns the `model` section."""
    return assemble("vila_m3_13b", towers.siglip_so400m_384(), llms.vicuna_13b(), template="vicuna_v1")
