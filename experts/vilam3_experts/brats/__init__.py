"""BraTS: subregions of gliomas in four MRI sequences, by MONAI's `brats_mri_segmentation` bundle."""
