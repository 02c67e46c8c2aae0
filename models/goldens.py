#!/usr/bin/env python3
"""Writes goldens: two sets of seeded inputs with native onnxruntime's outputs.

    <out>/<name>/data.json   {rtol, atol, inputs: [names], outputs: [names],
                              sets: [{inputs: [tensor], outputs: [tensor]}]}     tensors: see tensors.py

An output passes when its shape is the same and every |got - want| <= atol + rtol * |want|. The golden of a quantised
model has a `cosine` instead: its outputs pass when the cosine of both is at least that.

Why these tolerances. The outputs come from onnxruntime with its optimiser off, every operator
computed as written in float32. Another order of summation moves a value by some 1e-6 of its layer's
scale, and each layer passes that on; so rtol is 2e-3, and atol 2e-4 of the largest value of the
smallest-scaled output, which near zero stands for the layer's scale. A wrong kernel misses by far more.
For float16 outputs, which resolve 1e-3 of a value, rtol is 2e-2 and the share 2e-3. To show that
there is room, the script runs onnxruntime's optimiser too and refuses to write a golden of which
that run uses more than a quarter.

A value of a quantised model that lies between two steps may take either, and later layers pass the step on: no
bound holds for each element. Their outputs come from onnxruntime's unoptimised graph too, where a product between
DequantizeLinear and QuantizeLinear is one of floats; native onnxruntime's own integer products saturate on processors
without 8-bit dot products.

    python models/goldens.py                                # every recipe's model that has been built
    python models/goldens.py --dim batch=1 path/to/some_model.onnx
"""

import argparse
import hashlib
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

import tensors  # noqa: E402
from build import RECIPES, sha256  # noqa: E402
from recipes import _inputs  # noqa: E402

COSINE = 0.999
RTOL, ATOL_SHARE = 2e-3, 2e-4
RTOL_HALF, ATOL_SHARE_HALF = 2e-2, 2e-3
SEEDS = (1, 2)
ROOM = 0.25


def session(path, level):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def generic_inputs(declared, dims, seed):
    """Inputs for a model without a recipe: floats uniform in 0..1, integers and booleans 0 or 1."""
    rng = np.random.Generator(np.random.PCG64(seed))
    kinds = {
        "tensor(float)": np.float32,
        "tensor(float16)": np.float16,
        "tensor(double)": np.float64,
        "tensor(int64)": np.int64,
        "tensor(int32)": np.int32,
        "tensor(int8)": np.int8,
        "tensor(uint8)": np.uint8,
        "tensor(bool)": np.bool_,
    }
    arrays = {}
    for value in declared:
        if value.type not in kinds:
            raise RuntimeError(f"input {value.name} is a {value.type}; no seeded values for that")
        shape = []
        for dim in value.shape:
            if not isinstance(dim, int) and dim not in dims:
                raise RuntimeError(f"input {value.name} has shape {value.shape}: give --dim {dim}=N")
            shape.append(dim if isinstance(dim, int) else dims[dim])
        floating = np.issubdtype(kinds[value.type], np.floating)
        numbers = rng.random(shape) if floating else rng.integers(0, 2, shape)
        arrays[value.name] = np.asarray(numbers).astype(kinds[value.type])
    return arrays


def golden(path, name, dims):
    """The golden's JSON, and the share of its tolerance that onnxruntime's own optimiser uses (for a quantised model, the
    smallest cosine of what it gives)."""
    plain = session(path, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)
    optimised = session(path, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
    declared, outputs = plain.get_inputs(), [value.name for value in plain.get_outputs()]
    quantized = False
    if name in RECIPES:
        recipe = importlib.import_module(f"recipes.{name}")
        specs, quantized = recipe.INPUT_SETS, getattr(recipe, "QUANTIZED", False)
        feeds = [_inputs.make(spec, seed) for spec, seed in zip(specs, SEEDS, strict=True)]
    else:
        feeds = [generic_inputs(declared, dims, seed) for seed in SEEDS]

    wanted = [plain.run(None, feed) for feed in feeds]
    for arrays in wanted:
        for output, array in zip(outputs, arrays, strict=True):
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise RuntimeError(f"{name}: output {output} is not finite")
    names = [value.name for value in declared]
    sets = [
        {
            "inputs": [tensors.encode(feed[input_name]) for input_name in names],
            "outputs": [tensors.encode(array) for array in arrays],
        }
        for feed, arrays in zip(feeds, wanted, strict=True)
    ]
    record = {"inputs": names, "outputs": outputs, "sets": sets}
    pairs = [
        (got.astype(np.float64), want.astype(np.float64))
        for feed, arrays in zip(feeds, wanted, strict=True)
        for got, want in zip(optimised.run(None, feed), arrays, strict=True)
    ]
    if quantized:
        return {"cosine": COSINE} | record, min(cosine(got, want) for got, want in pairs)

    half = any(array.dtype == np.float16 for arrays in wanted for array in arrays)
    rtol, share = (RTOL_HALF, ATOL_SHARE_HALF) if half else (RTOL, ATOL_SHARE)
    scales = [max(np.abs(arrays[i].astype(np.float64)).max() for arrays in wanted) for i in range(len(outputs))]
    atol = float(share * min(scales))

    used = max(float((np.abs(got - want) / (atol + rtol * np.abs(want))).max()) for got, want in pairs)
    if used > ROOM:
        raise RuntimeError(f"{name}: onnxruntime's optimiser alone uses {used:.0%} of the tolerance")
    return {"rtol": rtol, "atol": atol} | record, used


def cosine(a, b):
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def locate(target, models):
    """(name, path) of a name under `models`, or of a path to an .onnx file."""
    path = Path(target)
    if path.suffix == ".onnx":
        return (path.parent.name if path.stem == "model" else path.stem), path
    return target, models / target / "model.onnx"


def model_digest(path):
    """SHA-256 of a model, from the stamp beside it where build.py left one."""
    stamp = path.with_name("stamp.json")
    if stamp.exists():
        have = json.loads(stamp.read_text())
        if have["bytes"] == path.stat().st_size:
            return have["sha256"]
    return sha256(path)


def write(target, args):
    name, path = locate(target, args.models)
    if not path.is_file():
        raise RuntimeError(f"no model at {path}; build it with models/build.py {name}")
    scripts = [Path(__file__), ROOT / "tensors.py", ROOT / "recipes" / "_inputs.py"]
    wanted = {
        "model": model_digest(path),
        "scripts": hashlib.sha256(b"".join(script.read_bytes() for script in scripts)).hexdigest(),
        "onnxruntime": onnxruntime.__version__,
        "dims": args.dim,
    }
    data, stamp = args.out / name / "data.json", args.out / name / "stamp.json"
    if data.exists() and stamp.exists() and json.loads(stamp.read_text()) == wanted:
        print(f"{name}: up to date")
        return
    stamp.unlink(missing_ok=True)
    record, used = golden(path, name, args.dim)
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text(json.dumps(record))
    stamp.write_text(json.dumps(wanted, indent=2) + "\n")
    bound = f"cosine {COSINE}" if "cosine" in record else f"atol {record['atol']:.3g}, rtol {record['rtol']:.3g}"
    uses = f"has {used:.6f}" if "cosine" in record else f"uses {used:.2%} of that"
    print(f"{name}: {bound}; onnxruntime's optimiser {uses}; {data.stat().st_size:,} bytes", flush=True)


def dimension(text):
    name, _, number = text.partition("=")
    if not name or not number.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=N")
    return name, int(number)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a built model, or a path to an .onnx file")
    parser.add_argument("--models", type=Path, default=ROOT.parent / "target" / "models")
    parser.add_argument("--out", type=Path, default=ROOT.parent / "target" / "goldens")
    parser.add_argument(
        "--dim",
        type=dimension,
        action="append",
        default=[],
        metavar="NAME=N",
        help="the size of a symbolic dimension, for models without a recipe",
    )
    args = parser.parse_args()
    args.dim = dict(args.dim)
    names = args.names or [name for name in RECIPES if (args.models / name / "model.onnx").exists()]
    failed = False
    for name in names:
        try:
            write(name, args)
        except RuntimeError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = True
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
