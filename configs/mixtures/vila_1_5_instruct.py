"""VILA-1.5's stage 3, the lists of one release; `vilam3 prepare instructions` reads the others."""

from vilam3_jax.configs.mixtures import Mixture

MIXTURE = Mixture("stage3_instruct", (("sharegpt4v/captions", 1), ("sharegpt4v/instruct", 1)))
