"""VILA-M3's stage 4 with the published repeats.

The published table counts dialogues (50,000 of VISTA3D, 15,000 of BraTS); this mixture applies rules to
slices. To match the table, prepare as many slices; `vilam3 data mixture` prints the counts.
"""

from vilam3_jax.configs.mixtures import Mixture

MIXTURE = Mixture(
    "stage4_expert",
    (
        ("medqa", 10),
        ("vqa_rad", 4),
        ("slake/en", 4),
        ("path_vqa", 4),
        ("medical_diff_vqa/questions:cxr", 2),
        ("mimic_annotation/pooled", 1),
        ("mimic_annotation/pooled:cxr", 1),
        ("msd/task03_liver:ct_tumor", 8),
        ("msd/task07_pancreas:ct_tumor", 8),
        ("msd/task09_spleen:ct_what", 8),
        ("totalsegmentator:ct_segment", 8),
        ("totalsegmentator:ct_what", 8),
        ("brats/2018:mri_what", 16),
        ("brats/2018:mri_grade", 16),
        ("brats/2018:mri_segment", 16),
    ),
)
