"""A small digit classifier, trained here on scikit-learn's 8x8 digits, augmented and enlarged to
28x28. Convolution, ReLU and max pooling three times, then two dense layers; written with numpy only.

The trained file is committed as models/digits.onnx, since training is not bit-reproducible between
machines (the BLAS sums in its own order); build() copies it. To train anew, and see the accuracy:

    python models/build.py --retrain-digits
"""

import shutil
from pathlib import Path

import numpy as np

from ._graph import FLOAT, Graph

NAME = "digits"
ABOUT = "digit classifier trained on scikit-learn's digits, opset 13"
SHARED = ()
FILES = ("digits.onnx",)
INPUT_SETS = [{"input": ("float", [1, 1, 28, 28], ("digit", None))}] * 2
COMMITTED = Path(__file__).resolve().parent.parent / "digits.onnx"

SIDE, BOX = 28, 20
CHANNELS = (12, 24, 32)
HIDDEN = 64
EPOCHS, BATCH, RATE = 60, 64, 2e-3
SEED = 7


def build(directory):
    shutil.copyfile(COMMITTED, directory / "model.onnx")


# Data: enlarge 8x8 to 28x28 through a random affine map, then vary the stroke.


def enlarge(image, rng=None):
    """One 8x8 digit (0..1) on a 28x28 canvas, its 8 rows over BOX pixels. With `rng`, a random
    shift, rotation, scale and shear, and a random stroke width and sharpness."""
    from scipy import ndimage

    angle = shear = row = column = 0.0
    scale_y = scale_x = 1.0
    if rng is not None:
        angle = np.deg2rad(rng.uniform(-15, 15))
        shear = rng.uniform(-0.15, 0.15)
        scale_y, scale_x = rng.uniform(0.75, 1.2), rng.uniform(0.7, 1.25)
        row, column = rng.uniform(-3, 3, 2)
    cos, sin = np.cos(angle), np.sin(angle)
    # From output pixels to input pixels, about both centres.
    turn = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, 0], [shear, 1]])
    matrix = turn * (8 / BOX) / np.array([[scale_y], [scale_x]])
    offset = np.array([3.5, 3.5]) - matrix @ (np.array([SIDE - 1, SIDE - 1]) / 2 + [row, column])
    x = ndimage.affine_transform(image, matrix, offset, (SIDE, SIDE), order=3, mode="grid-constant")
    # A steep ramp round a level: a low level fattens the stroke, a high one thins it.
    level = 0.4 if rng is None else rng.uniform(0.25, 0.6)
    steep = 3.0 if rng is None else rng.uniform(1.5, 8.0)
    x = np.clip((x - level) * steep + 0.5, 0, 1)
    if rng is not None and rng.random() < 0.2:
        x = np.clip(x + rng.normal(0, 0.05, x.shape), 0, 1)
    return x.astype(np.float32)


def split():
    """(train images, train labels, held-out images, held-out labels); a quarter is held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = digits.images / 16.0
    train_x, test_x, train_y, test_y = train_test_split(
        images, digits.target, test_size=0.25, stratify=digits.target, random_state=SEED
    )
    return train_x, train_y, test_x, test_y


# The network, NHWC inside: patches of every 3x3 window make convolution a matrix product.


def patches(x):
    n, h, w, c = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return np.concatenate(windows, axis=3).reshape(n * h * w, 9 * c)


def patches_gradient(gradient, shape):
    n, h, w, c = shape
    gradient = gradient.reshape(n, h, w, 9, c)
    padded = np.zeros((n, h + 2, w + 2, c), np.float32)
    for k in range(9):
        i, j = divmod(k, 3)
        padded[:, i : i + h, j : j + w] += gradient[:, :, :, k]
    return padded[:, 1:-1, 1:-1]


def pool(x):
    """2x2 maximum (an odd last row is dropped, as MaxPool does) and the winners' mask."""
    n, h, w, c = x.shape
    h, w = h // 2, w // 2
    tiles = x[:, : 2 * h, : 2 * w].reshape(n, h, 2, w, 2, c)
    best = tiles.max(axis=(2, 4), keepdims=True)
    winners = tiles == best
    return best.reshape(n, h, w, c), winners / winners.sum(axis=(2, 4), keepdims=True)


def pool_gradient(gradient, winners, shape):
    n, h, w, c = gradient.shape
    out = np.zeros(shape, np.float32)
    tiles = winners * gradient[:, :, None, :, None, :]
    out[:, : 2 * h, : 2 * w] = tiles.reshape(n, 2 * h, 2 * w, c)
    return out


def fresh_parameters(rng):
    sizes = [(9 * cin, cout) for cin, cout in zip((1, *CHANNELS[:-1]), CHANNELS, strict=True)]
    sizes += [(3 * 3 * CHANNELS[-1], HIDDEN), (HIDDEN, 10)]
    parameters = []
    for rows, columns in sizes:
        parameters.append((rng.standard_normal((rows, columns)) * np.sqrt(2 / rows)).astype(np.float32))
        parameters.append(np.zeros(columns, np.float32))
    return parameters


def forward(parameters, x):
    """Logits of a batch [n, 28, 28, 1], and what the backward pass needs."""
    tape = []
    for layer in range(3):
        weight, bias = parameters[2 * layer : 2 * layer + 2]
        columns = patches(x)
        active = np.maximum(columns @ weight + bias, 0).reshape(*x.shape[:3], -1)
        pooled, winners = pool(active)
        tape.append((x.shape, columns, active, winners))
        x = pooled
    flat = x.reshape(len(x), -1)
    hidden = np.maximum(flat @ parameters[6] + parameters[7], 0)
    tape.append((x.shape, flat, hidden))
    return hidden @ parameters[8] + parameters[9], tape


def backward(parameters, tape, gradient):
    shape, flat, hidden = tape[3]
    gradients = [None] * 10
    gradients[8], gradients[9] = hidden.T @ gradient, gradient.sum(0)
    gradient = (gradient @ parameters[8].T) * (hidden > 0)
    gradients[6], gradients[7] = flat.T @ gradient, gradient.sum(0)
    gradient = (gradient @ parameters[6].T).reshape(shape)
    for layer in (2, 1, 0):
        shape, columns, active, winners = tape[layer]
        gradient = pool_gradient(gradient, winners, active.shape) * (active > 0)
        gradient = gradient.reshape(-1, active.shape[-1])
        gradients[2 * layer], gradients[2 * layer + 1] = columns.T @ gradient, gradient.sum(0)
        if layer:
            gradient = patches_gradient(gradient @ parameters[2 * layer].T, shape)
    return gradients


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def train():
    """Adam on the cross-entropy with smoothed labels, the rate falling by a cosine."""
    train_x, train_y, test_x, test_y = split()
    rng = np.random.default_rng(SEED)
    parameters = fresh_parameters(rng)
    first = [np.zeros_like(p) for p in parameters]
    second = [np.zeros_like(p) for p in parameters]
    targets = np.eye(10, dtype=np.float32)[train_y] * 0.95 + 0.005
    step, steps = 0, EPOCHS * -(-len(train_x) // BATCH)
    for epoch in range(EPOCHS):
        order, loss = rng.permutation(len(train_x)), 0.0
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            x = np.stack([enlarge(train_x[row], rng) for row in rows])[..., None]
            logits, tape = forward(parameters, x)
            probabilities = softmax(logits)
            loss -= float((targets[rows] * np.log(probabilities + 1e-12)).sum())
            gradients = backward(parameters, tape, (probabilities - targets[rows]) / len(rows))
            step += 1
            rate = RATE * 0.5 * (1 + np.cos(np.pi * step / steps))
            for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                m += 0.1 * (g - m)
                v += 0.001 * (g * g - v)
                p -= (rate * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)).astype(np.float32)
        if epoch % 10 == 9:
            print(f"  epoch {epoch + 1}: loss {loss / len(train_x):.4f}", flush=True)
    write(parameters)
    evaluate(test_x, test_y)


def evaluate(images, labels):
    """Accuracy of the written file on the held-out digits, plain and augmented."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(COMMITTED), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(SEED + 1)
    for kind, generator in (("plain", None), ("augmented", rng)):
        right = 0
        for image, label in zip(images, labels, strict=True):
            x = enlarge(image, generator)[None, None]
            right += int(session.run(None, {"input": x})[0].argmax()) == label
        print(f"  held-out, {kind}: {right} of {len(labels)} right, {100 * right / len(labels):.2f}%")


def write(parameters):
    g = Graph("digits", 13, "weblane-models", "1")
    x = g.input("input", FLOAT, [1, 1, SIDE, SIDE])
    cin = 1
    for layer, cout in enumerate(CHANNELS, 1):
        weight = parameters[2 * layer - 2].reshape(3, 3, cin, cout).transpose(3, 2, 0, 1)
        inputs = [x, g.init(f"conv{layer}.weight", weight), g.init(f"conv{layer}.bias", parameters[2 * layer - 1])]
        x = g.node("Conv", inputs, f"/conv{layer}", kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1])
        x = g.node("Relu", [x], f"/relu{layer}")
        x = g.node("MaxPool", [x], f"/pool{layer}", kernel_shape=[2, 2], strides=[2, 2])
        cin = cout
    x = g.node("Flatten", [x], axis=1)
    # Flattening is channel-major in ONNX, channel-last above.
    weight = parameters[6].reshape(3, 3, cin, HIDDEN).transpose(3, 2, 0, 1).reshape(HIDDEN, -1)
    inputs = [x, g.init("fc1.weight", weight), g.init("fc1.bias", parameters[7])]
    x = g.node("Relu", [g.node("Gemm", inputs, "/fc1", transB=1)], "/fc1")
    inputs = [x, g.init("fc2.weight", parameters[8].T), g.init("fc2.bias", parameters[9])]
    x = g.node("Gemm", inputs, "/fc2", transB=1)
    g.node("Softmax", [x], "", ["probabilities"], axis=1)
    g.output("probabilities", FLOAT, [1, 10])
    g.save(COMMITTED)
