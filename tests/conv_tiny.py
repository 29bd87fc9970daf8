"""Small convolutional networks of every shape that channels can take."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LeNet(nn.Module):
    """Two convolutions without batch norm, flattened into Linears; bias everywhere."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 10, 3)
        self.fc1, self.fc2 = nn.Linear(10 * 9, 16), nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.tanh(self.conv1(x)), 2)
        x = F.avg_pool2d(torch.sigmoid(self.conv2(x)), 2)
        return self.fc2(F.dropout(F.relu(self.fc1(x.flatten(1))), 0.5, self.training))


def vgg(classes: int = 4) -> nn.Sequential:
    """Convolution, batch norm, activation, in a chain; global pooling."""
    layers: list[nn.Module] = []
    inputs = 3
    for outputs, pool in ((8, True), (12, False), (10, True)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2)] if pool else []
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class BasicBlock(nn.Module):
    """Named as torchvision and timm name it."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """Named as torchvision and timm name it."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        return self.relu(out + identity)


def _downsample(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """Named as torchvision's ResNet names its modules."""

    def __init__(
        self, block: type[nn.Module], widths: tuple[int, ...] = (4, 6), depth: int = 2, classes: int = 4
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0])
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        inputs = widths[0]
        for number, width in enumerate(widths):
            blocks = []
            for index in range(depth):
                blocks.append(block(inputs, width, 2 if number and not index else 1))
                inputs = width * blocks[-1].expansion  # type: ignore[operator]
            self.add_module(f"layer{number + 1}", nn.Sequential(*blocks))
        self.stages = len(widths)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for number in range(self.stages):
            x = self.get_submodule(f"layer{number + 1}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: widen, depthwise, narrow; optionally squeeze-and-excite."""

    def __init__(self, inputs: int, outputs: int, stride: int, squeeze: bool = False) -> None:
        super().__init__()
        wide = 3 * inputs
        self.conv = nn.Sequential(
            OrderedDict(
                widen=nn.Conv2d(inputs, wide, 1, bias=False),
                bn1=nn.BatchNorm2d(wide),
                act1=nn.ReLU6(inplace=True),
                depthwise=nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
                bn2=nn.BatchNorm2d(wide),
                act2=nn.ReLU6(inplace=True),
            )
        )
        self.reduce = nn.Conv2d(wide, 4, 1) if squeeze else None
        self.expand = nn.Conv2d(4, wide, 1) if squeeze else None
        self.narrow, self.bn3 = nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        if self.reduce is not None and self.expand is not None:
            gate = self.expand(F.relu(self.reduce(out.mean((2, 3), keepdim=True))))
            out = out * torch.sigmoid(gate)
        out = self.bn3(self.narrow(out))
        return x + out if self.residual else out


def mobilenet(classes: int = 4, squeeze: bool = False) -> nn.Sequential:
    blocks = [
        InvertedResidual(4, 4, 1, squeeze),
        InvertedResidual(4, 6, 2, squeeze),
        InvertedResidual(6, 6, 1, squeeze),
    ]
    stem = [nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU6()]
    head = [nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*stem, *blocks, *head, nn.Linear(12, classes))


class Windows(nn.Module):
    """Linears on maps with channels last, and on windows that are rows of their own: ConvNeXt, Swin, MobileViT."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 4, 4, bias=False), nn.BatchNorm2d(8)
        self.wide, self.narrow = nn.Linear(8, 20), nn.Linear(20, 8)
        self.inner, self.outer = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head, self.fc = nn.Conv2d(8, 10, 1), nn.Linear(10, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x))).permute(0, 2, 3, 1)  # (B, 4, 4, C)
        x = x + self.narrow(F.gelu(self.wide(x)))
        channels = x.shape[-1]
        x = x.reshape(-1, 2, 2, 2, 2, channels).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, channels)
        x = x + self.outer(F.gelu(self.inner(x)))  # (B * windows, 4, C)
        x = x.reshape(-1, 2, 2, 2, 2, channels).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 4, channels)
        x = F.relu(self.head(x.permute(0, 3, 1, 2)))
        return self.fc(x.mean((2, 3)))


class NormAct(nn.BatchNorm2d):
    """A batch norm that holds its activation, with a constructor of its own, as timm's BatchNormAct2d."""

    def __init__(self, features: int, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__(features)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class SameConv(nn.Conv2d):
    """A convolution that pads by itself, as timm's Conv2dSame."""

    def __init__(self, inputs: int, outputs: int, edge: int, groups: int = 1) -> None:
        super().__init__(inputs, outputs, edge, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class Twice(nn.Module):
    """Runs one convolution twice, perhaps under two names, or two with one weight, or with one batch norm."""

    def __init__(self, shared: str = "module", classes: int = 4) -> None:
        super().__init__()
        self.stem, self.mid = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 1)
        self.first, self.second = nn.Conv2d(5, 5, 3, padding=1), nn.Conv2d(5, 5, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(5), nn.BatchNorm2d(5)
        self.fc, self.again = nn.Linear(5, classes), shared == "run"
        if shared == "module":
            self.second = self.first
        elif shared == "weight":
            self.second.weight = self.first.weight
        elif shared == "norm":
            self.norm2 = self.norm1

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.mid(F.relu(self.stem(x))))
        x = F.relu(self.norm1(self.first(x)))
        x = F.relu(self.norm2((self.first if self.again else self.second)(x)))
        return self.fc(x.mean((2, 3)))


def padded(classes: int = 4) -> nn.Sequential:
    """Convolutions that pad with other values than zeros, before batch norms without weights."""

    def block(inputs: int, outputs: int, mode: str, **options: Any) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode=mode, **options)
        return [conv, nn.BatchNorm2d(outputs, affine=False), nn.ReLU()]

    stem, deep = block(3, 6, "reflect"), block(6, 6, "reflect", groups=6, bias=False)
    body = [*block(6, 8, "replicate", bias=False), nn.MaxPool2d(2), *block(8, 5, "circular", stride=2)]
    return nn.Sequential(*stem, *deep, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, classes))


def same(classes: int = 4) -> nn.Sequential:
    """A network all of whose convolutions are of an own class."""
    layers = [SameConv(3, 6, 3), NormAct(6), nn.MaxPool2d(2), SameConv(6, 8, 3), NormAct(8, nn.SiLU)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


def configured(classes: int = 4) -> nn.Sequential:
    """A network that calls something of its own its config."""
    model = same(classes)
    model.config = {"classes": classes}  # type: ignore[assignment]
    return model


def perceptron(classes: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, classes))


def basic(classes: int = 4) -> nn.Module:
    return ResNet(BasicBlock, classes=classes)


FAMILIES = {
    "lenet": (LeNet, (1, 16, 16)),
    "vgg": (vgg, (3, 16, 16)),
    "basic": (basic, (3, 16, 16)),
    "bottleneck": (lambda: ResNet(Bottleneck, (3, 4)), (3, 16, 16)),
    "mobilenet": (mobilenet, (3, 16, 16)),
    "squeeze": (lambda: mobilenet(squeeze=True), (3, 16, 16)),
    "windows": (Windows, (3, 16, 16)),
    "padded": (padded, (3, 16, 16)),
}


def tiny_cnn(family: str, seed: int = 0, **options: Any) -> nn.Module:
    """Return a model in evaluation mode whose batch norms have seen data, and whose every channel matters."""
    torch.manual_seed(seed)
    make, _ = FAMILIES[family]
    return seen_data(make(**options))


def seen_data(model: nn.Module) -> nn.Module:
    """Put a model into evaluation mode, its batch norms with drawn statistics and weights."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.5)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def tiny_images(family: str, count: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(count, *FAMILIES[family][1], generator=torch.Generator().manual_seed(seed))
