"""VILA-1.5's stage 3 with the lists of ShareGPT4V; `vilam3 prepare instructions` reads others."""

from vilam3_jax.configs.mixtures import Mixture

MIXTURE = Mixture("stage3_instruct", (("sharegpt4v/captions", 1), ("sharegpt4v/instruct", 1)))
