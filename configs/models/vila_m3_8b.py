"""VILA-M3 8B (MONAI/Llama3-VILA-M3-8B): SigLIP at 384 pixels and Llama-3-8B."""

from ml_collections import ConfigDict
from vilam3_jax.configs.models import assemble
from vilam3_jax.configs.models.parts import llms, towers

NEEDS_SLICE = True


def get_model() -> ConfigDict:
    """Returns the `model` section."""
    return assemble("vila_m3_8b", towers.siglip_so400m_384(), llms.llama3_8b(), template="llama_3")
