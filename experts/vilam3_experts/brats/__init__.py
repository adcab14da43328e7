"""BraTS: segments glioma subregions in four MRI sequences with MONAI's `brats_mri_segmentation` bundle."""
