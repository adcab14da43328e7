"""VILA-1.5's stage 2: image-text pairs of the web, interleaved documents, long descriptions."""

from vilam3_jax.configs.mixtures import Mixture

MIXTURE = Mixture("stage2b_pretrain", (("coyo/document", 1), ("mmc4", 1), ("sharegpt4v/pretrain", 1)))
