"""VILA-M3's stage 4 with replay of general instructions to reduce forgetting.

VILA-M3 lost a few points on general benchmarks in stage 4, which has no general data. Half an epoch of
ShareGPT4V's 665 thousand instructions per pass is 15 % of the samples at the published sizes.
"""

from vilam3_jax.configs.mixtures import Mixture, vila_m3_stage4

MIXTURE = Mixture("stage4_expert", (*vila_m3_stage4.MIXTURE.rows, ("sharegpt4v/instruct", 0.5)))
