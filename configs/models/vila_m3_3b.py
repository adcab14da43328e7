"""VILA-M3 3B (MONAI/Llama3-VILA-M3-3B): SigLIP at 384 pixels and Sheared-LLaMA-2.7B."""

from ml_collections import ConfigDict
from vilam3_jax.configs.models import assemble
from vilam3_jax.configs.models.parts import llms, towers

NEEDS_SLICE = True


def get_model() -> ConfigDict:
    """Returns the `model` section."""
    return assemble("vila_m3_3b", towers.siglip_so400m_384(), llms.sheared_llama_2_7b(), template="vicuna_v1")
