"""VILA-1.5's stage 2: web image-text pairs, interleaved documents, detailed descriptions."""

from vilam3_jax.configs.mixtures import Mixture

MIXTURE = Mixture("stage2b_pretrain", (("coyo/document", 1), ("mmc4", 1), ("sharegpt4v/pretrain", 1)))
