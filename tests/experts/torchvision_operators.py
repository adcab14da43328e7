"""torchvision with a PyTorch build that its wheel was not compiled for."""

import importlib.util
import sys


def declare_operators():
    """Makes torchvision importable; returns an object to keep alive while it is used, or None.

    Package indexes give torchvision for CUDA; its compiled operators are missing beside PyTorch for CPUs, and
    transformers imports it wherever it is installed. No test uses these operators: they are declared only.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # "operator torchvision::nms does not exist"
        import torch

        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None
