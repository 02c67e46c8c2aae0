#!/usr/bin/env python3
"""Writes ONNX's own backend test cases to files that the Rust and the in-page runner read.

    <out>/index.json                    [{name, kind, path, ops}]
    <out>/<kind>/<name>/model.onnx      (and whatever files the case keeps beside its model)
    <out>/<kind>/<name>/case.json       {name, kind, opsets, ops, rtol, atol, sets: [{inputs, outputs}]}

Every value has the `name` of its graph input or output and a `kind`:
  tensor    dtype, dims, b64 | strings (see tensors.py); an output may carry its own `rtol`
  sequence  items: [value]
  optional  value: value | null

A case passes as in onnx.backend.test.runner: same number of outputs, shapes and dtypes; strings
equal; else |got - want| <= atol + rtol * |want|, NaN equal to NaN, infinities equal by sign.

    python models/export_conformance.py                    # about ten seconds
    python models/export_conformance.py --check 'conv|lstm' # then run them with onnxruntime
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
import warnings
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

import tensors  # noqa: E402

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")
# What ONNX 1.23 collects; another number means another version or a case lost on the way.
EXPECTED = {"node": 1884, "simple": 23, "pytorch-converted": 82, "pytorch-operator": 35}
# The runner compares bfloat16 with at least two units in the last place.
BFLOAT16_RTOL = 2.0**-6


def operators(model):
    """Sorted operator names of a model, subgraphs and local functions included; `domain::Op` outside ai.onnx."""
    found = set()

    def walk(nodes):
        for node in nodes:
            found.add(node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}")
            for attribute in node.attribute:
                for graph in (attribute.g, *attribute.graphs):
                    walk(graph.node)

    walk(model.graph.node)
    for function in model.functions:
        walk(function.node)
    return sorted(found)


def encode(value, declared, rtol=None):
    """A value of a data set in the JSON form, by its declared onnx.TypeProto."""
    if declared.HasField("optional_type"):
        inner = None if value is None else encode(value, declared.optional_type.elem_type, rtol)
        return {"kind": "optional", "value": inner}
    if declared.HasField("sequence_type"):
        return {"kind": "sequence", "items": [encode(item, declared.sequence_type.elem_type, rtol) for item in value]}
    if not declared.HasField("tensor_type"):
        raise ValueError(f"no JSON form for a {declared.WhichOneof('value')}")
    entry = {"kind": "tensor", **tensors.encode(value)}
    if rtol is not None and entry["dtype"] == "bfloat16":
        entry["rtol"] = max(rtol, BFLOAT16_RTOL)
    return entry


def feeds(model):
    """Graph inputs that a caller gives: those without an initializer (old models list both)."""
    initialised = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in initialised]


def load_value(path, declared):
    """One .pb file of a case on disk, as the runner loads it."""
    data = path.read_bytes()
    if declared.HasField("sequence_type"):
        return numpy_helper.to_list(onnx.SequenceProto.FromString(data))
    if declared.HasField("optional_type"):
        return numpy_helper.to_optional(onnx.OptionalProto.FromString(data))
    return onnx.TensorProto.FromString(data)


def stored_sets(directory, inputs, outputs):
    """Data sets of a case on disk, in the order of their numbers."""
    sets = sorted(directory.glob("test_data_set_*"), key=lambda path: int(path.name.rsplit("_", 1)[1]))
    return [
        tuple(
            [load_value(folder / f"{role}_{i}.pb", value.type) for i, value in enumerate(values)]
            for role, values in (("input", inputs), ("output", outputs))
        )
        for folder in sets
    ]


def export(case, kind, out):
    """Writes one case and returns its line of the index."""
    directory = out / kind / case.name
    directory.mkdir(parents=True)
    if case.model is not None:
        model = case.model
        (directory / "model.onnx").write_bytes(model.SerializeToString())
    else:
        source = Path(case.model_dir)
        model = onnx.load(source / "model.onnx", load_external_data=False)
        for path in source.iterdir():
            if path.is_file() and path.name != "data.json":
                shutil.copyfile(path, directory / path.name)
    inputs, outputs = feeds(model), list(model.graph.output)
    sets = case.data_sets or stored_sets(Path(case.model_dir), inputs, outputs)
    rtol, atol = float(case.rtol), float(case.atol)
    record = {
        "name": case.name,
        "kind": kind,
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "ops": operators(model),
        "rtol": rtol,
        "atol": atol,
        "sets": [
            {
                "inputs": [{"name": d.name, **encode(v, d.type)} for d, v in zip(inputs, ins, strict=True)],
                "outputs": [{"name": d.name, **encode(v, d.type, rtol)} for d, v in zip(outputs, outs, strict=True)],
            }
            for ins, outs in sets
        ],
    }
    if not record["sets"]:
        raise ValueError(f"{case.name}: no data sets")
    (directory / "case.json").write_text(json.dumps(record))
    return {"name": case.name, "kind": kind, "path": f"{kind}/{case.name}", "ops": record["ops"]}


def decode(entry):
    """The Python value of a JSON value."""
    if entry["kind"] == "optional":
        return None if entry["value"] is None else decode(entry["value"])
    if entry["kind"] == "sequence":
        return [decode(item) for item in entry["items"]]
    return tensors.decode(entry)


def compare(got, want, rtol, atol):
    """Raises AssertionError as ONNX's runner does."""
    if want["kind"] == "optional":
        if want["value"] is None:
            assert got is None, "wanted an empty optional"
            return
        want = want["value"]
    if want["kind"] == "sequence":
        assert isinstance(got, list) and len(got) == len(want["items"]), "another length of the sequence"
        for item, wanted in zip(got, want["items"], strict=True):
            compare(item, wanted, rtol, atol)
        return
    array = decode(want)
    got = np.asarray(got)
    assert got.shape == array.shape, f"shape {got.shape}, wanted {array.shape}"
    if want["dtype"] == "string":
        np.testing.assert_array_equal(got.astype(object), array)
        return
    assert got.dtype == array.dtype, f"dtype {got.dtype}, wanted {array.dtype}"
    if want["dtype"] == "bfloat16":
        got, array = got.astype(np.float32), array.astype(np.float32)
    np.testing.assert_allclose(got, array, rtol=want.get("rtol", rtol), atol=atol)


def check(out, index, pattern):
    """Runs the written cases with onnxruntime, to test this export (its failures are its own gaps)."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    counts = {"passed": 0, "not run": 0, "wrong": 0}
    for line in index:
        if not re.search(pattern, line["name"]):
            continue
        directory = out / line["path"]
        case = json.loads((directory / "case.json").read_text())
        try:
            session = onnxruntime.InferenceSession(
                str(directory / "model.onnx"), options, providers=["CPUExecutionProvider"]
            )
            results = [session.run(None, {v["name"]: decode(v) for v in s["inputs"]}) for s in case["sets"]]
        except Exception:  # noqa: BLE001 - onnxruntime has a class for each status; all mean: it cannot run this
            counts["not run"] += 1
            continue
        try:
            for got, data_set in zip(results, case["sets"], strict=True):
                for value, want in zip(got, data_set["outputs"], strict=True):
                    compare(value, want, case["rtol"], case["atol"])
            counts["passed"] += 1
        except AssertionError as error:
            counts["wrong"] += 1
            print(f"{line['path']}: {' '.join(str(error).split())[:160]}")
    print(", ".join(f"{name}: {count}" for name, count in counts.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT.parent / "target" / "conformance")
    parser.add_argument("--force", action="store_true", help="write even when the stamp matches")
    parser.add_argument("--check", metavar="REGEX", help="run the matching cases with onnxruntime afterwards")
    args = parser.parse_args()

    stamp = args.out / "stamp.json"
    wanted = {
        "onnx": metadata.version("onnx"),
        "numpy": metadata.version("numpy"),
        "sources": hash_of((ROOT / name).read_text() for name in ("export_conformance.py", "tensors.py")),
    }
    if not args.force and stamp.exists() and json.loads(stamp.read_text()) == wanted:
        index = json.loads((args.out / "index.json").read_text())
        print(f"{args.out}: {len(index)} cases, up to date")
    else:
        index = export_all(args.out)
        stamp.write_text(json.dumps(wanted, indent=2) + "\n")
    if args.check is not None:
        check(args.out, index, args.check)


def hash_of(texts):
    return hashlib.sha256("".join(texts).encode()).hexdigest()


def export_all(out):
    from onnx.backend.test.loader import load_model_tests

    for kind in KINDS:
        shutil.rmtree(out / kind, ignore_errors=True)
    (out / "stamp.json").unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    index = []
    with warnings.catch_warnings():
        # The cases divide by zero and overflow on purpose.
        warnings.simplefilter("ignore", RuntimeWarning)
        for kind in KINDS:
            cases = sorted(load_model_tests(kind=kind), key=lambda case: case.name)
            index += [export(case, kind, out) for case in cases]
            print(f"{kind}: {len(cases)} cases", flush=True)
            if len(cases) != EXPECTED[kind]:
                raise SystemExit(f"{kind}: {len(cases)} cases, wanted {EXPECTED[kind]} (onnx {onnx.__version__})")
    (out / "index.json").write_text(json.dumps(index) + "\n")
    return index


if __name__ == "__main__":
    main()
