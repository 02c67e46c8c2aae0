"""MobileNetV2 1.0 at 224 (Sandler et al. 2018), as torch.onnx exports torchvision's in eval mode:
BatchNorm folded into the convolutions, ReLU6 as Clip with bounds from Constant nodes."""

from ._graph import FLOAT, Graph, Weights

NAME = "mobilenet_v2"
ABOUT = "MobileNetV2, 3.5 M parameters, PyTorch style, BatchNorm folded, opset 13"
SHARED = ()
IMAGE = {"input": ("float", [1, 3, 224, 224], ("image", 1))}
INPUT_SETS = [IMAGE, IMAGE]

# Expansion, output channels, repeats, first stride.
BLOCKS = [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]


def build(directory):
    g = Graph("main_graph", 13, "weblane-models", "1")
    w = Weights(NAME)

    def conv(x, scope, cin, cout, kernel, stride=1, groups=1, gain=2.0):
        key = scope.strip("/").replace("/", ".")
        shape = (cout, cin // groups, kernel, kernel)
        fan_in = shape[1] * kernel * kernel
        weight = g.init(f"{key}.weight", (w.he if groups > 1 else w.he_centred)(f"{key}.weight", shape, fan_in, gain))
        bias = g.init(f"{key}.bias", w.normal(f"{key}.bias", (cout,), 0.1))
        pad = kernel // 2
        return g.node(
            "Conv",
            [x, weight, bias],
            scope,
            dilations=[1, 1],
            group=groups,
            kernel_shape=[kernel, kernel],
            pads=[pad] * 4,
            strides=[stride, stride],
        )

    def relu6(x, scope):
        low = g.constant(0.0, scope, "float32")
        high = g.constant(6.0, scope, "float32")
        return g.node("Clip", [x, low, high], scope)

    x = g.input("input", FLOAT, ["batch_size", 3, 224, 224])
    scope = "/features/features.0"
    x = conv(x, f"{scope}/features.0.0", 3, 32, 3, stride=2, gain=1.0)
    x = relu6(x, f"{scope}/features.0.2")

    cin, index = 32, 1
    for expand, cout, repeats, first_stride in BLOCKS:
        for n in range(repeats):
            stride = first_stride if n == 0 else 1
            scope = f"/features/features.{index}/conv"
            hidden, skip, step = cin * expand, x, 0
            if expand != 1:
                # The input is a linear bottleneck, not a ReLU's output: gain 1 keeps its variance.
                x = conv(x, f"{scope}/conv.0/conv.0.0", cin, hidden, 1, gain=1.0)
                x = relu6(x, f"{scope}/conv.0/conv.0.2")
                step = 1
            x = conv(x, f"{scope}/conv.{step}/conv.{step}.0", hidden, hidden, 3, stride, hidden)
            x = relu6(x, f"{scope}/conv.{step}/conv.{step}.2")
            residual = stride == 1 and cin == cout
            # A residual branch adds half a variance, so that depth does not blow the sum up.
            x = conv(x, f"{scope}/conv.{step + 1}", hidden, cout, 1, gain=1.0 if residual else 2.0)
            if residual:
                x = g.node("Add", [skip, x], f"/features/features.{index}")
            cin, index = cout, index + 1

    scope = f"/features/features.{index}"
    x = conv(x, f"{scope}/features.{index}.0", cin, 1280, 1, gain=1.0)
    x = relu6(x, f"{scope}/features.{index}.2")
    x = g.node("GlobalAveragePool", [x])
    x = g.node("Flatten", [x], axis=1)
    weight = g.init("classifier.1.weight", w.he_centred("classifier.1.weight", (1000, 1280), 1280))
    bias = g.init("classifier.1.bias", w.normal("classifier.1.bias", (1000,), 0.1))
    g.node("Gemm", [x, weight, bias], "/classifier/classifier.1", ["logits"], alpha=1.0, beta=1.0, transB=1)
    g.output("logits", FLOAT, ["batch_size", 1000])
    g.save(directory / "model.onnx")
