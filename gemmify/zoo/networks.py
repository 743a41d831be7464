"""The architectures of the zoo, each as its paper (and the published ONNX file) has it, on a 224 x 224 picture."""

from __future__ import annotations

from gemmify.zoo.builder import Builder, Tensor

CLASSES = 1000


def alexnet(b: Builder, x: Tensor) -> Tensor:
    """Krizhevsky et al. 2012 in Caffe's form: LRN before pooling, conv2/4/5 in two groups, the last pool rounded up."""
    x = b.relu("relu1", b.conv("conv1", x, 96, 11, stride=4))
    x = b.max_pool("pool1", b.lrn("norm1", x), 3, 2)
    x = b.relu("relu2", b.conv("conv2", x, 256, 5, pad=2, groups=2))
    x = b.max_pool("pool2", b.lrn("norm2", x), 3, 2)
    x = b.relu("relu3", b.conv("conv3", x, 384, 3, pad=1))
    x = b.relu("relu4", b.conv("conv4", x, 384, 3, pad=1, groups=2))
    x = b.relu("relu5", b.conv("conv5", x, 256, 3, pad=1, groups=2))
    x = b.flatten("flatten", b.max_pool("pool5", x, 3, 2, (0, 0, 1, 1)))
    x = b.relu("relu6", b.fc("fc6", x, 4096))
    x = b.relu("relu7", b.fc("fc7", x, 4096))
    return b.softmax(b.fc("fc8", x, CLASSES))


def _vgg(b: Builder, x: Tensor, depths: tuple[int, ...]) -> Tensor:
    for stage, (depth, width) in enumerate(zip(depths, (64, 128, 256, 512, 512), strict=True), 1):
        for i in range(1, depth + 1):
            x = b.relu(f"relu{stage}_{i}", b.conv(f"conv{stage}_{i}", x, width, 3, pad=1))
        x = b.max_pool(f"pool{stage}", x, 2, 2)
    x = b.flatten("flatten", x)
    x = b.relu("relu6", b.fc("fc6", x, 4096))
    x = b.relu("relu7", b.fc("fc7", x, 4096))
    return b.softmax(b.fc("fc8", x, CLASSES))


def vgg16(b: Builder, x: Tensor) -> Tensor:
    """Simonyan and Zisserman 2014, configuration D."""
    return _vgg(b, x, (2, 2, 3, 3, 3))


def vgg19(b: Builder, x: Tensor) -> Tensor:
    """Simonyan and Zisserman 2014, configuration E."""
    return _vgg(b, x, (2, 2, 4, 4, 4))


# name: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection (Szegedy et al. 2014, table 1)
_INCEPTION = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


def _inception(b: Builder, name: str, x: Tensor) -> Tensor:
    m1, r3, m3, r5, m5, mp = _INCEPTION[name]

    def conv(part: str, x: Tensor, m: int, k: int) -> Tensor:
        return b.relu(f"relu_{name}_{part}", b.conv(f"inception_{name}_{part}", x, m, k, pad=k // 2))

    branches = [
        conv("1x1", x, m1, 1),
        conv("3x3", conv("3x3_reduce", x, r3, 1), m3, 3),
        conv("5x5", conv("5x5_reduce", x, r5, 1), m5, 5),
        conv("pool_proj", b.max_pool(f"pool_{name}", x, 3, 1, (1, 1, 1, 1)), mp, 1),
    ]
    return b.concat(f"inception_{name}_concat", branches)


def googlenet(b: Builder, x: Tensor) -> Tensor:
    """Inception v1, Szegedy et al. 2014, with its two LRN layers and without the auxiliary heads of training."""
    ceil = (0, 0, 1, 1)  # Caffe rounds pooled sizes up: 112 -> 56, 56 -> 28, ...
    x = b.relu("relu1", b.conv("conv1_7x7_s2", x, 64, 7, stride=2, pad=3))
    x = b.lrn("norm1", b.max_pool("pool1", x, 3, 2, ceil))
    x = b.relu("relu2_reduce", b.conv("conv2_3x3_reduce", x, 64, 1))
    x = b.lrn("norm2", b.relu("relu2", b.conv("conv2_3x3", x, 192, 3, pad=1)))
    x = b.max_pool("pool2", x, 3, 2, ceil)
    x = b.max_pool("pool3", _inception(b, "3b", _inception(b, "3a", x)), 3, 2, ceil)
    for name in ("4a", "4b", "4c", "4d", "4e"):
        x = _inception(b, name, x)
    x = _inception(b, "5b", _inception(b, "5a", b.max_pool("pool4", x, 3, 2, ceil)))
    x = b.flatten("flatten", b.global_average_pool("pool5", x))
    return b.softmax(b.fc("fc", x, CLASSES))


def resnet50(b: Builder, x: Tensor) -> Tensor:
    """He et al. 2015, v1 (stride in the first 1x1 of a block), batch normalization as nodes of its own."""

    def conv_bn(name: str, x: Tensor, m: int, k: int, stride: int = 1, scale: float = 1.0) -> Tensor:
        return b.batch_norm(f"{name}_bn", b.conv(name, x, m, k, stride, k // 2, bias=False), scale)

    x = b.relu("conv1_relu", conv_bn("conv1", x, 64, 7, 2))
    x = b.max_pool("pool1", x, 3, 2, (1, 1, 1, 1))
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 2):
        for i in range(1, blocks + 1):
            name, stride = f"res{stage}_{i}", 2 if i == 1 and stage > 2 else 1
            y = b.relu(f"{name}_a_relu", conv_bn(f"{name}_a_1x1", x, width, 1, stride))
            y = b.relu(f"{name}_b_relu", conv_bn(f"{name}_b_3x3", y, width, 3))
            y = conv_bn(f"{name}_c_1x1", y, 4 * width, 1, scale=0.5)  # small branches: the sum must not grow by block
            if i == 1:
                x = conv_bn(f"{name}_shortcut_1x1", x, 4 * width, 1, stride)
            x = b.relu(f"{name}_relu", b.add(f"{name}_add", x, y))
    x = b.flatten("flatten", b.global_average_pool("pool5", x))
    return b.softmax(b.fc("fc", x, CLASSES))


def squeezenet(b: Builder, x: Tensor) -> Tensor:
    """Iandola et al. 2016, version 1.1."""

    def fire(i: int, x: Tensor, squeeze: int, expand: int) -> Tensor:
        x = b.relu(f"fire{i}_squeeze_relu", b.conv(f"fire{i}_squeeze1x1", x, squeeze, 1))
        left = b.relu(f"fire{i}_expand1x1_relu", b.conv(f"fire{i}_expand1x1", x, expand, 1))
        right = b.relu(f"fire{i}_expand3x3_relu", b.conv(f"fire{i}_expand3x3", x, expand, 3, pad=1))
        return b.concat(f"fire{i}_concat", [left, right])

    x = b.relu("conv1_relu", b.conv("conv1", x, 64, 3, stride=2))
    x = b.max_pool("pool1", x, 3, 2)
    x = b.max_pool("pool3", fire(3, fire(2, x, 16, 64), 16, 64), 3, 2)
    x = b.max_pool("pool5", fire(5, fire(4, x, 32, 128), 32, 128), 3, 2)
    for i, (squeeze, expand) in enumerate(((48, 192), (48, 192), (64, 256), (64, 256)), 6):
        x = fire(i, x, squeeze, expand)
    x = b.relu("conv10_relu", b.conv("conv10", x, CLASSES, 1))
    return b.softmax(b.flatten("flatten", b.global_average_pool("pool10", x)))


# expansion, output channels, repeats, first stride (Sandler et al. 2018, table 2)
_BOTTLENECKS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenet_v2(b: Builder, x: Tensor) -> Tensor:
    """Sandler et al. 2018: inverted residuals, depthwise 3x3, ReLU6 (as Clip), batch normalization as nodes."""

    def conv_bn(name: str, x: Tensor, m: int, k: int, stride: int = 1, groups: int = 1) -> Tensor:
        return b.batch_norm(f"{name}_bn", b.conv(name, x, m, k, stride, k // 2, groups, bias=False))

    x = b.relu6("conv1_relu6", conv_bn("conv1", x, 32, 3, 2))
    index = 0
    for expansion, m, repeats, first_stride in _BOTTLENECKS:
        for i in range(repeats):
            index += 1
            name, stride, y = f"block{index}", first_stride if i == 0 else 1, x
            if expansion > 1:
                y = b.relu6(f"{name}_expand_relu6", conv_bn(f"{name}_expand", y, expansion * x.channels, 1))
            y = conv_bn(f"{name}_depthwise", y, y.channels, 3, stride, groups=y.channels)
            y = conv_bn(f"{name}_project", b.relu6(f"{name}_depthwise_relu6", y), m, 1)
            x = b.add(f"{name}_add", x, y) if i else y
    x = b.relu6("conv_last_relu6", conv_bn("conv_last", x, 1280, 1))
    x = b.flatten("flatten", b.global_average_pool("pool", x))
    return b.softmax(b.fc("fc", x, CLASSES))
