#!/usr/bin/env python3
"""Builds the .tflite twins of three workloads, each in float and quantised, for LiteRT.js in `cargo xtask bench peers`. Nothing else needs them.

    python3 -m venv target/venv-tflite && target/venv-tflite/bin/pip install -r models/requirements-tflite.txt
    target/venv-tflite/bin/python models/build_tflite.py            # or NAME...

MobileNetV2 and ResNet-50 are tf.keras' own; EfficientNet-Lite0 is built by layers from the table that the ONNX recipe
has. Weights are Keras' seeded initial ones: the times mean something, the outputs nothing. The quantised twins (`_int8`)
have int8 weights per channel and int8 activations from seeded noise, and take and give floats, as the ONNX files do. Each
model lands in <out>/<name>/model.tflite beside a stamp.json; a model whose stamp still matches is left alone.
"""

import argparse
import ast
import hashlib
import json
import os
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SOURCES = [Path(__file__).resolve(), ROOT / "recipes" / "efficientnet_lite0.py", ROOT / "requirements-tflite.txt"]
SHAPE = (224, 224, 3)
CLASSES = 1000
SEED = 1
INT8 = "_int8"


def efficientnet_lite0_blocks():
    """The block table of the ONNX recipe, read and not imported: its packages are not in this environment."""
    for node in ast.parse(SOURCES[1].read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "BLOCKS":
            return ast.literal_eval(node.value)
    raise RuntimeError(f"{SOURCES[1]} has no BLOCKS")


def efficientnet_lite0(keras):
    """EfficientNet-Lite0: EfficientNet-B0 with ReLU6 for swish and without squeeze-and-excite."""
    layers = keras.layers

    def conv(x, channels, kernel, stride=1, activate=True):
        x = layers.Conv2D(channels, kernel, stride, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization(epsilon=1e-3)(x)
        return layers.ReLU(6.0)(x) if activate else x

    def depthwise(x, kernel, stride):
        x = layers.DepthwiseConv2D(kernel, stride, padding="same", use_bias=False)(x)
        return layers.ReLU(6.0)(layers.BatchNormalization(epsilon=1e-3)(x))

    image = layers.Input(SHAPE, name="images")
    x = conv(image, 32, 3, stride=2)
    for kernel, first_stride, expand, channels, repeats in efficientnet_lite0_blocks():
        for n in range(repeats):
            stride, skip = first_stride if n == 0 else 1, x
            if expand != 1:
                x = conv(x, x.shape[-1] * expand, 1)
            x = conv(depthwise(x, kernel, stride), channels, 1, activate=False)
            if stride == 1 and skip.shape[-1] == channels:
                x = layers.Add()([x, skip])
    x = layers.GlobalAveragePooling2D()(conv(x, 1280, 1))
    return keras.Model(image, layers.Dense(CLASSES, activation="softmax")(x))


# Architecture, and its number of parameters as published, BatchNorm's moving statistics included.
RECIPES = {
    "mobilenet_v2": (lambda keras: keras.applications.MobileNetV2(weights=None), 3_538_984),
    "efficientnet_lite0": (efficientnet_lite0, 4_694_024),
    "resnet50": (lambda keras: keras.applications.ResNet50(weights=None), 25_636_712),
}


NAMES = [name + suffix for suffix in ("", INT8) for name in RECIPES]


def sources_hash():
    total = hashlib.sha256()
    for source in SOURCES:
        total.update(hashlib.sha256(source.read_bytes()).digest())
    return total.hexdigest()


def check(tf, content, quantized):
    """Refuses a model whose operators or output are not those of an image classifier, in float or quantised."""
    import numpy as np

    interpreter = tf.lite.Interpreter(model_content=content, experimental_op_resolver_type=without_delegates(tf))
    interpreter.allocate_tensors()
    (image,), (scores,) = interpreter.get_input_details(), interpreter.get_output_details()
    counts = {}
    for operator in interpreter._get_ops_details():
        counts[operator["op_name"]] = counts.get(operator["op_name"], 0) + 1
    print(f"  {', '.join(f'{name} {count}' for name, count in sorted(counts.items()))}")
    if list(image["shape"]) != [1, *SHAPE] or list(scores["shape"]) != [1, CLASSES]:
        raise RuntimeError(f"shapes are {image['shape']} -> {scores['shape']}")
    if {image["dtype"], scores["dtype"]} != {np.float32}:
        raise RuntimeError("input and output are not in float")
    # Quantised through: once at the input, and back at the output.
    expected = {"QUANTIZE": 1, "DEQUANTIZE": 1} if quantized else {}
    if {name: count for name, count in counts.items() if "QUANT" in name} != expected:
        raise RuntimeError(f"the operators are not {'integer' if quantized else 'float'} ones: {counts}")
    interpreter.set_tensor(image["index"], np.random.default_rng(SEED).random(image["shape"], dtype=np.float32))
    interpreter.invoke()
    out = interpreter.get_tensor(scores["index"])
    # A quantised score has steps of 1/256, in which a thousand equal ones vanish.
    if not ((0 <= out) & (out <= 1)).all() or not quantized and abs(out.sum() - 1) > 1e-3:
        raise RuntimeError("the scores are not probabilities")
    return counts


def without_delegates(tf):
    """Without XNNPACK, which would stand as one operator for all that it takes."""
    return tf.lite.experimental.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES


def calibration():
    """A few images of noise, of which the converter takes the ranges of activations."""
    import numpy as np

    random = np.random.default_rng(SEED)
    for _ in range(8):
        yield [random.random((1, *SHAPE), dtype=np.float32)]


def build(name, out, force):
    directory = out / name
    directory.mkdir(parents=True, exist_ok=True)
    path, stamp = directory / "model.tflite", directory / "stamp.json"
    wanted = sources_hash()
    if not force and path.exists() and stamp.exists():
        have = json.loads(stamp.read_text())
        if have["recipe"] == wanted and have["bytes"] == path.stat().st_size:
            print(f"{name}: up to date")
            return
    print(f"{name}: building", flush=True)
    start = time.monotonic()
    stamp.unlink(missing_ok=True)

    # Its import takes seconds and talks much.
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    quantized = name.endswith(INT8)
    make, parameters = RECIPES[name.removesuffix(INT8)]
    tf.keras.utils.set_random_seed(SEED)
    model = make(tf.keras)
    if model.count_params() != parameters:
        raise RuntimeError(f"{name} has {model.count_params():,} parameters, not {parameters:,}")
    # A fixed batch, as the ONNX workload is run; and constants for variables, or they would stay variables.
    call = tf.function(lambda image: model(image, training=False))
    concrete = call.get_concrete_function(tf.TensorSpec([1, *SHAPE], tf.float32))
    frozen = convert_variables_to_constants_v2(concrete)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([frozen])
    if quantized:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = calibration
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    content = converter.convert()
    operators = check(tf, content, quantized)
    path.write_bytes(content)
    record = {"recipe": wanted, "bytes": len(content), "operators": operators}
    stamp.write_text(json.dumps(record, indent=2) + "\n")
    print(f"{name}: {len(content):,} bytes in {time.monotonic() - start:.1f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument("--out", type=Path, default=ROOT.parent / "target" / "models-tflite")
    parser.add_argument("--force", action="store_true", help="build even when the stamp matches")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in NAMES]
    if unknown:
        parser.error(f"no such model: {', '.join(unknown)}")
    for name in args.names or NAMES:
        build(name, args.out, args.force)


if __name__ == "__main__":
    main()
