"""VISTA3D, MONAI's segmentation network for CT."""
