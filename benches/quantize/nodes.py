#!/usr/bin/env python3
"""Every quantised node of a model beside native onnxruntime's; `cargo xtask bench nodes` builds what this needs.

A quantised node is a QuantizeLinear with the operators between it and the quantised tensors before it: what weblane runs
as one integer operator. Each is cut out as a model of its own, gets the tensors that onnxruntime has there, and its output
is compared with onnxruntime's. onnxruntime does not optimise: its own integer kernels saturate on CPUs without VNNI.

Each bound is checked, and the script fails when one does not hold.

    python benches/quantize/nodes.py [--models a,b] [--record FILE]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper

ROOT = Path(__file__).resolve().parents[2]
WEBLANE = Path(os.environ.get("WEBLANE") or ROOT / "target" / "release" / "weblane")
MODELS = ["mobilenet_v2_int8", "efficientnet_lite0_int8", "resnet50_int8"]
# Most steps that an element may be off, and most elements that may be off at all.
STEPS, SHARE = 1, 1e-3


def reference(model):
    """Every quantised tensor of the model by name, from seeded input."""
    names = [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    types = {x.name: x.data_type for x in model.graph.initializer}
    zero_points = {node.output[0]: types[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    every = onnx.ModelProto()
    every.CopyFrom(model)
    del every.graph.output[:]
    every.graph.output.extend(helper.make_tensor_value_info(name, zero_points[name], None) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(every.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(1)
    feeds = {
        x.name: rng.normal(0, 1, [d if isinstance(d, int) else 1 for d in x.shape]).astype(np.float32)
        for x in session.get_inputs()
    }
    return dict(zip(names, session.run(names, feeds), strict=True)), zero_points


def cut(model, name, tensors, types):
    """The part of a model between a quantised tensor and those before it, and the names of these; None at an input."""
    producers = {output: node for node in model.graph.node for output in node.output}
    wanted, inputs, todo = set(), [], list(producers[name].input)
    wanted.add(name)
    while todo:
        value = todo.pop()
        if value in tensors:
            if value not in inputs:
                inputs.append(value)
        elif value in producers:
            wanted.add(value)
            todo.extend(x for x in producers[value].input if x)
    if not inputs:
        return None
    nodes = [node for node in model.graph.node if wanted.intersection(node.output)]
    used = {x for node in nodes for x in node.input}
    graph = helper.make_graph(
        nodes,
        "node",
        [helper.make_tensor_value_info(x, types[x], tensors[x].shape) for x in inputs],
        [helper.make_tensor_value_info(name, types[name], None)],
        [x for x in model.graph.initializer if x.name in used],
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version), inputs


def run(part, inputs, tensors, folder):
    """The only output of a small model in weblane."""
    onnx.save(part, folder / "node.onnx")
    command = [str(WEBLANE), "run", str(folder / "node.onnx"), "--output", str(folder / "out")]
    for index, name in enumerate(inputs):
        np.save(folder / f"{index}.npy", tensors[name])
        command += ["--input", f"{name}={folder}/{index}.npy"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"weblane run: {done.stderr.strip()}")
    (output,) = (folder / "out").glob("*.npy")
    result = np.load(output)
    output.unlink()
    return result


def measure(name):
    """A row of the record."""
    model = onnx.load(ROOT / "target" / "models" / name / "model.onnx")
    tensors, types = reference(model)
    row = {"model": name, "nodes": 0, "largest_difference": 0, "largest_share": 0.0, "node": ""}
    with tempfile.TemporaryDirectory() as folder:
        for output in tensors:
            found = cut(model, output, tensors, types)
            if found is None:
                continue
            part, inputs = found
            got = run(part, inputs, tensors, Path(folder))
            difference = np.abs(got.astype(int) - tensors[output].astype(int))
            share = float(np.mean(difference > 0))
            row["nodes"] += 1
            row["largest_difference"] = max(row["largest_difference"], int(difference.max()))
            if share > row["largest_share"]:
                row["largest_share"], row["node"] = share, output
    return row


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--record", default=ROOT / "benches" / "records" / "quantized-nodes.json")
    options = parser.parse_args()
    rows = [measure(name) for name in options.models.split(",")]
    for row in rows:
        print(
            f"{row['model']:26} {row['nodes']:3} nodes  at most {row['largest_difference']} step(s) off,"
            f" in at most {100 * row['largest_share']:.4f}% of a node's elements"
        )
    record = {
        "what": "quantised nodes beside native onnxruntime on the same inputs: steps, share of elements that differ",
        "command": "cargo xtask bench nodes",
        "onnxruntime": onnxruntime.__version__,
        "results": rows,
    }
    Path(options.record).write_text(json.dumps(record, indent=2) + "\n")
    print(f"record: {options.record}")
    bad = [row["model"] for row in rows if row["largest_difference"] > STEPS or row["largest_share"] > SHARE]
    if bad:
        sys.exit(f"more than {STEPS} step(s) or {100 * SHARE}% off: {', '.join(bad)}")


if __name__ == "__main__":
    main()
