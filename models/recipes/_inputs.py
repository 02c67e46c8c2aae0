"""Seeded inputs for a recipe's INPUT_SETS: {name: (dtype, dims, kind)}."""

import numpy as np

CLS, SEP, FIRST_WORD = 101, 102, 999


def image(rng, dims, channel_axis):
    """Normalised image-like noise, mean 0 and variance 1: equal parts of patches of 56, 14 and 2
    pixels. White noise would be averaged away by the first layers and the global pool."""
    sides = [n for axis, n in enumerate(dims) if axis not in (0, channel_axis)]
    total = np.zeros((dims[0], dims[channel_axis], *sides), np.float32)
    for patch in (56, 14, 2):
        coarse = [side // patch for side in sides]
        x = rng.standard_normal((dims[0], dims[channel_axis], *coarse), dtype=np.float32)
        total += x.repeat(patch, axis=2).repeat(patch, axis=3)
    return np.ascontiguousarray(np.moveaxis(total / np.float32(np.sqrt(3)), 1, channel_axis))


def stroke(rng, dims):
    """One thick random polyline on a black square, values in 0..1."""
    side = dims[-1]
    rows, columns = np.mgrid[:side, :side].astype(np.float32)
    points = rng.uniform(0.2 * side, 0.8 * side, (5, 2)).astype(np.float32)
    nearest = np.full((side, side), np.inf, np.float32)
    for start, end in zip(points[:-1], points[1:], strict=True):
        for t in np.linspace(0, 1, 32, dtype=np.float32):
            row, column = start + (end - start) * t
            nearest = np.minimum(nearest, np.hypot(rows - row, columns - column))
    return np.broadcast_to(np.clip(2 - nearest, 0, 1), dims).copy()


def make(spec, seed):
    """One set of inputs, {name: array}. Kinds: ("image", channel axis), ("digit", _): a blurred
    stroke in 0..1, ("tokens", vocabulary),
    ("mask", _): ones, the last fifth zero in sets of odd length, ("ones", _), ("types", _): 0 then 1,
    ("normal", _)."""
    rng = np.random.Generator(np.random.PCG64(seed))
    arrays = {}
    for name, (dtype, dims, kind) in spec.items():
        length = dims[-1]
        if kind[0] == "image":
            array = image(rng, dims, kind[1])
        elif kind[0] == "digit":
            array = stroke(rng, dims)
        elif kind[0] == "tokens":
            array = rng.integers(FIRST_WORD, kind[1], dims)
            array[:, 0], array[:, -1] = CLS, SEP
        elif kind[0] == "mask":
            array = np.ones(dims)
            if length % 2:
                array[:, length - length // 5 :] = 0
        elif kind[0] == "ones":
            array = np.ones(dims)
        elif kind[0] == "normal":
            array = rng.standard_normal(dims, dtype=np.float32)
        elif kind[0] == "types":
            array = np.zeros(dims)
            array[:, length // 2 :] = 1
        else:
            raise ValueError(f"{name}: unknown kind of input {kind!r}")
        arrays[name] = array.astype({"float": np.float32, "int64": np.int64}[dtype])
    return arrays
