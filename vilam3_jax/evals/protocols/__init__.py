"""The built-in protocols, one module per family; importing one registers its protocols."""

MODULES = ("flare", "llava_med", "medevalkit", "medgemma_card", "vila_m3")
