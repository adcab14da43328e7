"""The built-in protocols, one module per family; importing one registers its protocols."""

MODULES = ("experts", "findings", "grounding", "reports", "robustness")
