"""TorchXRayVision's chest X-ray networks as one expert with eight members.

Source of networks, thresholds and pre-processing: Cohen et al., TorchXRayVision: A library of chest X-ray
datasets and models (https://arxiv.org/abs/2111.00595), release v1 of its weights. The class sets are those of
VILA-M3 (https://arxiv.org/abs/2411.12915). Nothing here imports torchxrayvision.
"""
