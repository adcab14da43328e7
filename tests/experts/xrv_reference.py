"""torchxrayvision as the reference for the ensemble: its networks with generated weights."""

import contextlib
import io

import torch
from torchvision_operators import declare_operators

_OPERATORS = declare_operators()  # the declarations end with the object


def torchxrayvision():
    """Imports the package."""
    import torchxrayvision

    return torchxrayvision


def densenet(seed, thresholds=None):
    """torchxrayvision's DenseNet-121 with random weights and settled batch statistics."""
    torch.manual_seed(seed)
    network = torchxrayvision().models.DenseNet(weights=None, op_threshs=thresholds)
    return _settle(network, 224)


def resnet(seed):
    """The network in torchxrayvision's ResNet, whose constructor would download weights."""
    torchxrayvision()
    from torchvision.models import resnet50

    torch.manual_seed(seed)
    network = resnet50(weights=None, num_classes=18)
    network.conv1 = torch.nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    return _settle(network, 512)


def _settle(network, side):
    """Sets the running statistics to those of noise, for logits of realistic size."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # a plain mean
    with torch.no_grad():
        noise = torch.rand(2, 1, side // 4, side // 4) * 2048 - 1024
        network.train()(torch.nn.functional.interpolate(noise, (side // 2, side // 2)))
    return network.eval()


def answer(network, films, thresholds):
    """Probabilities of the reference: sigmoid and `op_norm`, [B, classes]."""
    with torch.inference_mode(), contextlib.redirect_stdout(io.StringIO()):
        logits = network(films)
        return torchxrayvision().models.op_norm(torch.sigmoid(logits), thresholds)
