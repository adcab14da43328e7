"""VILA-1.5's stage 1: captions for the projector."""

from vilam3_jax.configs.mixtures import Mixture

MIXTURE = Mixture("stage2a_align", (("cc3m_595k/caption", 1),))
