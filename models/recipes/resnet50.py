"""ResNet-50 v1.5 (He et al. 2015; stride in the 3x3 as in torchvision), exported with its
BatchNormalization nodes left in (`training=TrainingMode.PRESERVE` style)."""

from ._graph import FLOAT, Graph, Weights

NAME = "resnet50"
ABOUT = "ResNet-50, 25.6 M parameters, PyTorch style, BatchNormalization left in, opset 14"
SHARED = ()
IMAGE = {"input": ("float", [1, 3, 224, 224], ("image", 1))}
INPUT_SETS = [IMAGE, IMAGE]

# Bottleneck width, blocks, stride of the first block.
STAGES = [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)]
EXPANSION = 4


def build(directory):
    g = Graph("main_graph", 14, "weblane-models", "1")
    w = Weights(NAME)

    def conv_bn(x, scope, conv_name, bn_name, cin, cout, kernel, stride=1, gamma=1.0):
        prefix = scope.strip("/").replace("/", ".")
        prefix = f"{prefix}." if prefix else ""
        key = f"{prefix}{conv_name}.weight"
        weight = g.init(key, w.he_centred(key, (cout, cin, kernel, kernel), cin * kernel * kernel))
        pad = kernel // 2
        x = g.node(
            "Conv",
            [x, weight],
            f"{scope}/{conv_name}",
            dilations=[1, 1],
            group=1,
            kernel_shape=[kernel, kernel],
            pads=[pad] * 4,
            strides=[stride, stride],
        )
        bn = f"{prefix}{bn_name}"
        parameters = [
            g.init(f"{bn}.weight", w.uniform(f"{bn}.weight", (cout,), 0.8 * gamma, 1.2 * gamma)),
            g.init(f"{bn}.bias", w.normal(f"{bn}.bias", (cout,), 0.1)),
            g.init(f"{bn}.running_mean", w.normal(f"{bn}.running_mean", (cout,), 0.1)),
            g.init(f"{bn}.running_var", w.uniform(f"{bn}.running_var", (cout,), 0.8, 1.2)),
        ]
        return g.node(
            "BatchNormalization",
            [x, *parameters],
            f"{scope}/{bn_name}",
            epsilon=1e-5,
            momentum=0.9,
            training_mode=0,
        )

    x = g.input("input", FLOAT, ["batch_size", 3, 224, 224])
    x = conv_bn(x, "", "conv1", "bn1", 3, 64, 7, stride=2)
    x = g.node("Relu", [x], "/relu")
    x = g.node(
        "MaxPool",
        [x],
        "/maxpool",
        ceil_mode=0,
        dilations=[1, 1],
        kernel_shape=[3, 3],
        pads=[1, 1, 1, 1],
        strides=[2, 2],
    )

    cin = 64
    for stage, (width, blocks, first_stride) in enumerate(STAGES, 1):
        for block in range(blocks):
            stride = first_stride if block == 0 else 1
            scope, skip, cout = f"/layer{stage}/layer{stage}.{block}", x, width * EXPANSION
            x = conv_bn(x, scope, "conv1", "bn1", cin, width, 1)
            x = g.node("Relu", [x], f"{scope}/relu")
            x = conv_bn(x, scope, "conv2", "bn2", width, width, 3, stride)
            x = g.node("Relu", [x], f"{scope}/relu")
            # Sixteen branches are summed: a small last gamma keeps the sum from growing 2^16-fold.
            x = conv_bn(x, scope, "conv3", "bn3", width, cout, 1, gamma=0.4)
            if block == 0:
                # 0.7 squared halves the variance that He's gain of 2 gives.
                skip = conv_bn(skip, scope, "downsample.0", "downsample.1", cin, cout, 1, stride, gamma=0.7)
            x = g.node("Add", [x, skip], scope)
            x = g.node("Relu", [x], f"{scope}/relu")
            cin = cout

    x = g.node("GlobalAveragePool", [x], "/avgpool")
    x = g.node("Flatten", [x], axis=1)
    weight = g.init("fc.weight", w.he_centred("fc.weight", (1000, cin), cin))
    bias = g.init("fc.bias", w.normal("fc.bias", (1000,), 0.1))
    g.node("Gemm", [x, weight, bias], "/fc", ["logits"], alpha=1.0, beta=1.0, transB=1)
    g.output("logits", FLOAT, ["batch_size", 1000])
    g.save(directory / "model.onnx")
