"""The convolutional networks of the experiments: CIFAR's ResNets (He et al. 2016, 4.2), LeNet with batch norm."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, and a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """Three stages of `blocks` basic blocks, 16, 32 and 64 channels wide."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 1, blocks)
        self.layer2 = _stage(16, 32, 2, blocks)
        self.layer3 = _stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


class LeNet(nn.Module):
    """Two 5x5 convolutions with batch norm and pooling, two hidden Linears, for 28x28 images of one channel."""

    def __init__(self, classes: int = 10, widths: tuple[int, int, int, int] = (20, 50, 120, 84)) -> None:
        super().__init__()
        a, b, c, d = widths
        self.conv1, self.bn1 = nn.Conv2d(1, a, 5, padding=2, bias=False), nn.BatchNorm2d(a)
        self.conv2, self.bn2 = nn.Conv2d(a, b, 5, bias=False), nn.BatchNorm2d(b)
        self.fc1, self.fc2, self.fc3 = nn.Linear(25 * b, c), nn.Linear(c, d), nn.Linear(d, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


def resnet56() -> nn.Module:
    """Return the network of 56 layers, untrained."""
    return CifarResNet(9)


def lenet(classes: int = 10) -> nn.Module:
    """Return LeNet, untrained."""
    return LeNet(classes)


MODELS = {"resnet56": resnet56, "lenet": lenet}
