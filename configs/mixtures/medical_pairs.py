"""Image-text pairs for stage 1: films with reports or sentences from labels, and published figures."""

from vilam3_jax.configs.mixtures import Mixture

MIXTURE = Mixture(
    "stage1_vision",
    (
        ("mimic_cxr_reports/pairs", 1),
        ("chexpert/pairs", 1),
        ("chest_xray14/pairs", 1),
        ("iu_xray/pairs", 1),
        ("roco_v2", 1),
        ("pmc_oa/subcaptions", 1),
    ),
)
