"""The layers that are measured: each from a network, with the reason it is there.

The one table for `python -m fastconv verify` (the layers with a number of images in `verified`) and for the benchmarks
(all of them). A name is the network and the path of its module, as in fastconv.models, torchvision or timm; vgg_a_lrn
is in its paper alone (table 1). The first layer of each op is its share of a --quick run. Batch norms are folded: their
convolutions have a bias here.
"""

from __future__ import annotations

from typing import Any

from fastconv.measure.calls import Layer, Shape


def layers_of(op: str) -> list[Layer]:
    """The layers of this op, the --quick one first."""
    return [layer for layer in LAYERS if layer.op == op]


def _conv(
    op: str,
    name: str,
    input: tuple[int, int],
    weight: Shape,
    why: str,
    *,
    bias: bool = True,
    residual: bool = False,
    verified: int = 0,
    **options: Any,
) -> Layer:
    """`input` is (channels, side); a residual has the side of the input."""
    channels, side = input
    shapes: dict[str, Any] = {"input": (1, channels, side, side), "weight": weight}
    if bias:
        shapes["bias"] = weight[:1]
    if residual:
        shapes["residual"] = (1, weight[0], side, side)
    return Layer(op, name, shapes, why, options, verified)


def _group(name: str, input: tuple[int, int], filters: tuple[int, ...], why: str, verified: int = 0) -> Layer:
    channels, side = input
    shapes = {
        "input": (1, channels, side, side),
        "weights": [(k, channels, 1, 1) for k in filters],
        "biases": [(k,) for k in filters],
    }
    return Layer("pointwise_conv2d_group", name, shapes, why, {"activation": "relu"}, verified)


def _separable(
    name: str,
    input: tuple[int, int],
    filters: int,
    why: str,
    *,
    depthwise_bias: bool = False,
    verified: int = 0,
    **options: Any,
) -> Layer:
    channels, side = input
    shapes = {
        "input": (1, channels, side, side),
        "depthwise_weight": (channels, 1, 3, 3),
        "pointwise_weight": (filters, channels, 1, 1),
        **({"depthwise_bias": (channels,)} if depthwise_bias else {}),
        "pointwise_bias": (filters,),
    }
    return Layer("depthwise_separable_conv2d", name, shapes, why, {"stride": 1, "padding": 1, **options}, verified)


def _add(name: str, channels: int, side: int, why: str, verified: int = 0) -> Layer:
    shape = (1, channels, side, side)
    return Layer("add_relu", name, {"input": shape, "other": shape}, why, verified=verified)


def _lrn(name: str, channels: int, side: int, k: float, why: str, *, verified: int = 0, **activation: str) -> Layer:
    options = {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": k, **activation}
    return Layer("local_response_norm", name, {"input": (1, channels, side, side)}, why, options, verified)


LAYERS = (
    # ---------------------------------------------------------------------------- conv2d_relu
    _conv(
        *("conv2d_relu", "resnet50/layer1.0.conv2", (64, 56), (64, 64, 3, 3)),
        "the narrowest 3x3 of ResNet: the bias and ReLU passes weigh most",
        padding=1,
    ),
    _conv(
        *("conv2d_relu", "alexnet2012/features.0", (3, 227), (96, 3, 11, 11)),
        "the largest filter; three channels leave nothing to vectorise over",
        stride=4,
        verified=1,
    ),
    _conv(
        *("conv2d_relu", "alexnet2012/features.4", (96, 27), (256, 48, 5, 5)),
        "two groups, odd sides",
        padding=2,
        groups=2,
        verified=1,
    ),
    _conv(
        *("conv2d_relu", "vgg16/features.0", (3, 224), (64, 3, 3, 3)),
        "writes 21 times what it reads: bound by storing the output once",
        padding=1,
    ),
    _conv(
        *("conv2d_relu", "vgg16/features.2", (64, 224), (64, 64, 3, 3)),
        "the largest feature map of the zoo",
        padding=1,
    ),
    _conv(
        *("conv2d_relu", "vgg16/features.19", (512, 28), (512, 512, 3, 3)),
        "bound by arithmetic: fusing gains little here and must not lose",
        padding=1,
    ),
    _conv(
        *("conv2d_relu", "googlenet/inception4e.branch3.1.0", (32, 14), (128, 32, 5, 5)),
        "5x5 on few channels, far more filters than channels",
        padding=2,
        verified=2,
    ),
    _conv(
        *("conv2d_relu", "inception_v3/Mixed_6e.branch7x7_2.conv", (192, 17), (192, 192, 1, 7)),
        "a row filter, padded along the row alone",
        padding=(0, 3),
    ),
    _conv(
        *("conv2d_relu", "resnet50/conv1", (3, 224), (64, 3, 7, 7)),
        "the stem of ResNet, GoogLeNet and their kin",
        stride=2,
        padding=3,
        verified=1,
    ),
    _conv(
        *("conv2d_relu", "resnet50/layer3.1.conv2", (256, 14), (256, 256, 3, 3)),
        "the 3x3 that ResNet-50 has most of",
        padding=1,
        verified=1,
    ),
    _conv(
        *("conv2d_relu", "resnet50/layer4.0.conv2", (512, 14), (512, 512, 3, 3)),
        "stride 2, and 9 MiB of weights for 49 pixels: bound by reading them",
        stride=2,
        padding=1,
    ),
    # ------------------------------------------------------------------------ conv2d_add_relu
    _conv(
        *("conv2d_add_relu", "resnet18/layer1.0.conv2", (64, 56), (64, 64, 3, 3)),
        "the largest residual block: a third of the traffic is the residual",
        padding=1,
        residual=True,
    ),
    _conv(
        *("conv2d_add_relu", "resnet18/layer2.0.conv2", (128, 28), (128, 128, 3, 3)),
        "between the two: weights and activations weigh alike",
        padding=1,
        residual=True,
        verified=1,
    ),
    _conv(
        *("conv2d_add_relu", "resnet18/layer4.0.conv2", (512, 7), (512, 512, 3, 3)),
        "the smallest: weights outweigh all activations",
        padding=1,
        residual=True,
    ),
    # ----------------------------------------------------------------------- pointwise_conv2d
    _conv(
        *("pointwise_conv2d", "resnet50/layer1.0.conv3", (64, 56), (256, 64, 1, 1)),
        "the bottleneck's expansion, with residual and ReLU on ResNet's largest map",
        residual=True,
        activation="relu",
        verified=1,
    ),
    _conv(
        *("pointwise_conv2d", "resnet50/layer1.1.conv1", (256, 56), (64, 256, 1, 1)),
        "the bottleneck's reduction: reads four times what it writes",
        activation="relu",
    ),
    _conv(
        *("pointwise_conv2d", "resnet50/layer3.0.downsample.0", (512, 28), (1024, 512, 1, 1)),
        "the shortcut: stride 2 skips three quarters of the input, no activation",
        stride=2,
        verified=1,
    ),
    _conv(
        *("pointwise_conv2d", "resnet50/layer4.0.conv3", (512, 7), (2048, 512, 1, 1)),
        "49 pixels: at batch 1 a product of a matrix by a few vectors",
        residual=True,
        activation="relu",
    ),
    _conv(
        *("pointwise_conv2d", "mobilenet_v2/features.3.conv.0.0", (24, 56), (144, 24, 1, 1)),
        "the inverted bottleneck's expansion: 24 channels, ReLU6",
        activation="relu6",
        verified=1,
    ),
    _conv(
        *("pointwise_conv2d", "mobilenet_v2/features.3.conv.2", (144, 56), (24, 144, 1, 1)),
        "its projection: linear, so there is only the bias to fuse",
    ),
    # ----------------------------------------------------------------- pointwise_conv2d_group
    _group(
        *("googlenet/inception3a", (192, 28), (64, 96, 16)),
        "the first Inception module: the largest input that three branches share",
        verified=1,
    ),
    _group(
        *("googlenet/inception5b", (832, 7), (384, 192, 48)),
        "the last: the most channels, the fewest pixels",
    ),
    _group("inception_v3/Mixed_6b", (768, 17), (192, 128, 128), "the branches before the 1x7s"),
    # ----------------------------------------------------------------------- depthwise_conv2d
    _conv(
        *("depthwise_conv2d", "mobilenet_v2/features.3.conv.1.0", (144, 56), (144, 1, 3, 3)),
        "the typical one: ReLU6, stride 1",
        padding=1,
        activation="relu6",
    ),
    _conv(
        *("depthwise_conv2d", "mobilenet_v2/features.2.conv.1.0", (96, 112), (96, 1, 3, 3)),
        "stride 2 on the largest map",
        stride=2,
        padding=1,
        activation="relu6",
    ),
    _conv(
        *("depthwise_conv2d", "mobilenet_v2/features.4.conv.1.0", (144, 56), (144, 1, 3, 3)),
        "stride 2 on the input of the typical one",
        stride=2,
        padding=1,
        activation="relu6",
        verified=1,
    ),
    _conv(
        *("depthwise_conv2d", "mobilenet_v2/features.17.conv.1.0", (960, 7), (960, 1, 3, 3)),
        "49 pixels, half of them on the border",
        padding=1,
        activation="relu6",
    ),
    _conv(
        *("depthwise_conv2d", "xception/entry.6.conv2.depthwise", (128, 147), (128, 1, 3, 3)),
        "odd sides, neither bias nor activation: the bare convolution",
        padding=1,
        bias=False,
    ),
    _conv(
        *("depthwise_conv2d", "xception/middle.0.body.1.depthwise", (728, 19), (728, 1, 3, 3)),
        "the same on many channels of few pixels",
        padding=1,
        bias=False,
        verified=1,
    ),
    # ------------------------------------------------------------- depthwise_separable_conv2d
    _separable(
        *("xception/middle.0.body.1", (728, 19), 728),
        "25 of Xception's 34 are like this one; 728 is not a multiple of 16",
        verified=1,
    ),
    _separable(
        *("xception/entry.6.conv2", (128, 147), 128),
        "the largest intermediate result, 11 MB, which fusing need not store",
    ),
    _separable(
        *("mobilenet_v2/features.4.conv", (144, 56), 32),
        "stride 2, ReLU6 between, fewer channels out than in",
        depthwise_bias=True,
        stride=2,
        depthwise_activation="relu6",
    ),
    _separable(
        *("mobilenet_v1/blocks.3.0", (256, 28), 512),
        "stride 2 and an activation after each of the two, the paper's ReLU",
        depthwise_bias=True,
        stride=2,
        depthwise_activation="relu",
        pointwise_activation="relu",
        verified=1,
    ),
    # ------------------------------------------------------------------------------- add_relu
    _add("resnet50/layer1.0", 256, 56, "the largest sum of ResNet: 9.2 MiB to move", verified=1),
    _add("resnet50/layer4.0", 2048, 7, "the smallest: the call itself counts"),
    # -------------------------------------------------------------------- local_response_norm
    _lrn("alexnet2012/features.2", 96, 55, 2.0, "the first LRN ever, and the larger of AlexNet's"),
    _lrn("alexnet2012/features.6", 256, 27, 2.0, "many channels, odd number of pixels"),
    _lrn("alexnet2012/features.2+relu", 96, 55, 2.0, "with the ReLU before it", activation="relu", verified=1),
    _lrn("googlenet/stem.5", 192, 56, 1.0, "the largest of GoogLeNet", verified=1),
    _lrn("vgg_a_lrn/features.2", 64, 224, 1.0, "the largest of the zoo, beyond every cache"),
)
