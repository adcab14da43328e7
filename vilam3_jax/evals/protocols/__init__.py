"""The built-in protocols, one module per family; importing one registers its protocols."""

MODULES = (
    "experts", "findings", "flare", "grounding", "llava_med", "medevalkit", "medgemma_card", "reports",
    "robustness", "vila_m3",
)  # fmt: skip
