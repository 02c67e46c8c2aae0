"""EfficientNet-Lite0 (no squeeze-and-excite, ReLU6 for swish), as tf2onnx writes a TensorFlow model:
NHWC input and one Transpose, TensorFlow's SAME padding as asymmetric pads, BatchNormalization left
in with Keras' epsilon, ReLU6 as Clip with initializers, MatMul + Add head, Softmax."""

import numpy as np

from ._graph import FLOAT, Graph, Weights

NAME = "efficientnet_lite0"
ABOUT = "EfficientNet-Lite0, 4.7 M parameters, tf2onnx style, NHWC input, opset 11"
SHARED = ()
IMAGE = {"images:0": ("float", [1, 224, 224, 3], ("image", 3))}
INPUT_SETS = [IMAGE, IMAGE]

# Kernel, first stride, expansion, output channels, repeats.
BLOCKS = [
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
]


def same_pads(size, kernel, stride):
    """TensorFlow's SAME: the odd pixel goes to the end. Returns (pads, output size)."""
    out = -(-size // stride)
    total = max((out - 1) * stride + kernel - size, 0)
    begin, end = total // 2, total - total // 2
    return [begin, begin, end, end], out


def build(directory):
    g = Graph("tf2onnx", 11, "weblane-models", "1")
    w = Weights(NAME)
    size = 224

    def conv_bn(x, scope, cin, cout, kernel, stride=1, depthwise=False, gain=2.0):
        nonlocal size
        op = "depthwise_conv2d/depthwise" if depthwise else "conv2d/Conv2D"
        shape = (cout, 1 if depthwise else cin, kernel, kernel)
        key = f"{scope}/{op}_weights_fused"
        weight = g.init(key, (w.he if depthwise else w.he_centred)(key, shape, shape[1] * kernel * kernel, gain))
        pads, size = same_pads(size, kernel, stride)
        x = g.node(
            "Conv",
            [x, weight],
            f"{scope}/{op}",
            dilations=[1, 1],
            group=cout if depthwise else 1,
            kernel_shape=[kernel, kernel],
            pads=pads,
            strides=[stride, stride],
        )
        bn = f"{scope}/tpu_batch_normalization/ReadVariableOp"
        parameters = [
            g.init(f"{bn}/gamma", w.uniform(f"{bn}/gamma", (cout,), 0.8, 1.2)),
            g.init(f"{bn}/beta", w.normal(f"{bn}/beta", (cout,), 0.1)),
            g.init(f"{bn}/moving_mean", w.normal(f"{bn}/moving_mean", (cout,), 0.1)),
            g.init(f"{bn}/moving_variance", w.uniform(f"{bn}/moving_variance", (cout,), 0.8, 1.2)),
        ]
        return g.node(
            "BatchNormalization",
            [x, *parameters],
            f"{scope}/tpu_batch_normalization/FusedBatchNormV3",
            epsilon=1e-3,
            momentum=0.9,
        )

    def relu6(x, scope):
        low = g.init(g.unique(f"{scope}/Relu6_min"), np.float32(0))
        high = g.init(g.unique(f"{scope}/Relu6_max"), np.float32(6))
        return g.node("Clip", [x, low, high], f"{scope}/Relu6")

    x = g.input("images:0", FLOAT, ["unk__1", 224, 224, 3])
    root = "efficientnet-lite0/model"
    x = g.node("Transpose", [x], f"{root}/stem/conv2d/Conv2D", perm=[0, 3, 1, 2])
    x = conv_bn(x, f"{root}/stem", 3, 32, 3, stride=2, gain=1.0)
    x = relu6(x, f"{root}/stem")

    cin, index = 32, 0
    for kernel, first_stride, expand, cout, repeats in BLOCKS:
        for n in range(repeats):
            stride = first_stride if n == 0 else 1
            scope, hidden, skip = f"{root}/blocks_{index}", cin * expand, x
            if expand != 1:
                x = relu6(conv_bn(x, f"{scope}/expand", cin, hidden, 1, gain=1.0), f"{scope}/expand")
            x = conv_bn(x, f"{scope}/dw", hidden, hidden, kernel, stride, depthwise=True)
            x = relu6(x, f"{scope}/dw")
            residual = stride == 1 and cin == cout
            x = conv_bn(x, f"{scope}/project", hidden, cout, 1, gain=1.0 if residual else 2.0)
            if residual:
                x = g.node("Add", [x, skip], f"{scope}/Add")
            cin, index = cout, index + 1

    x = relu6(conv_bn(x, f"{root}/head", cin, 1280, 1, gain=1.0), f"{root}/head")
    x = g.node("GlobalAveragePool", [x], f"{root}/head/global_average_pooling2d/Mean")
    x = g.node("Squeeze", [x], f"{root}/head/global_average_pooling2d/Mean_Squeeze", axes=[2, 3])
    key = f"{root}/head/dense/MatMul/ReadVariableOp:0"
    x = g.node("MatMul", [x, g.init(key, w.he_centred(key, (1000, 1280), 1280).T)], f"{root}/head/dense/MatMul")
    key = f"{root}/head/dense/BiasAdd/ReadVariableOp:0"
    x = g.node("Add", [x, g.init(key, w.normal(key, (1000,), 0.1))], f"{root}/head/dense/BiasAdd")
    g.node("Softmax", [x], "Softmax", ["Softmax:0"], axis=1)
    g.output("Softmax:0", FLOAT, ["unk__1", 1000])
    g.save(directory / "model.onnx")
