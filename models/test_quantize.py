"""The quantiser's files against onnxruntime: it loads them, and computes what weblane computes.

Needs the native program; where it has not been built these tests are skipped, by name.

onnxruntime's 8-bit products saturate on processors that have only vpmaddubsw, so weights have 7 bits here.
"""

import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

DIGITS = ROOT / "digits.onnx"


def program():
    """The program that WEBLANE names, or the newest one that cargo has built."""
    built = [ROOT.parent / "target" / kind / "weblane" for kind in ("release", "debug")]
    found = [Path(os.environ["WEBLANE"])] if "WEBLANE" in os.environ else [p for p in built if p.exists()]
    if not found:
        raise unittest.SkipTest("the program weblane is not there; cargo build -p weblane-cli makes it")
    return max(found, key=lambda p: p.stat().st_mtime)


def weblane(*args):
    done = subprocess.run([program(), *map(str, args)], capture_output=True, text=True)
    if done.returncode != 0:
        raise AssertionError(done.stderr)
    return done.stdout


def cosine(a, b):
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return a @ b / np.sqrt((a @ a) * (b @ b))


def initializer(name, array):
    return numpy_helper.from_array(array, name)


def transformer():
    """A table, a projection by MatMul, one by Gemm, and what stands between them in a transformer."""
    rng = np.random.default_rng(1)
    weights = {
        "table": rng.standard_normal((100, 48)),
        "w": rng.standard_normal((48, 80)) / 7,
        "b": rng.standard_normal(80),
        "v": rng.standard_normal((20, 80)) / 9,
        "c": rng.standard_normal(20),
        "rows": np.zeros(0),
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["h"], "gather"),
        helper.make_node("MatMul", ["h", "w"], ["p"], "project"),
        helper.make_node("Add", ["p", "b"], ["q"], "bias"),
        helper.make_node("Sigmoid", ["q"], ["s"], "gate"),
        helper.make_node("Mul", ["q", "s"], ["r"], "gated"),
        helper.make_node("Gemm", ["r", "v", "c"], ["y"], "head", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "transformer",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 20])],
        [initializer(name, w.astype(np.float32)) for name, w in weights.items() if w.size],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def convolutions():
    rng = np.random.default_rng(2)
    shapes = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 1, 3, 3), "w3": (4, 8, 1, 1), "t": (4, 3, 2, 2), "half": (1,)}
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
        helper.make_node("MaxPool", ["r1"], ["m"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["m", "w2"], ["c2"], "depthwise", pads=[1, 1, 1, 1], group=8),
        helper.make_node("Add", ["c2", "m"], ["a"], "residual"),
        helper.make_node("Concat", ["a", "m"], ["cat"], "concat", axis=1),
        helper.make_node("Split", ["cat"], ["s1", "s2"], "split", axis=1),
        helper.make_node("Mul", ["s1", "half"], ["scaled"], "scale"),
        helper.make_node("Conv", ["scaled", "w3"], ["c3"], "pointwise"),
        helper.make_node("Sigmoid", ["c3"], ["g"], "sigmoid"),
        helper.make_node("ConvTranspose", ["g", "t"], ["y"], "up", strides=[2, 2]),
    ]
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, 16, 16])],
        [initializer(name, (rng.standard_normal(s) / 2).astype(np.float32)) for name, s in shapes.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


class Quantize(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        program()

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def check(self, model, feeds, *args, least=0.999, agreement=0.9999):
        """Quantises and runs in both; returns the file and the report."""
        source, out, report = (self.folder / n for n in ("model.onnx", "out.onnx", "report.json"))
        if isinstance(model, Path):
            source = model
        else:
            onnx.save(model, source)
        samples = self.folder / "samples"
        samples.mkdir(exist_ok=True)
        for i, feed in enumerate(feeds):
            np.savez(samples / f"{i}.npz", **feed)
        weblane("quantize", source, "-o", out, "--calibration", samples, "--report", report, "--quiet", *args)
        written = onnx.load(out)
        onnx.checker.check_model(written, full_check=True)
        float_session, session = (
            onnxruntime.InferenceSession(str(p), providers=["CPUExecutionProvider"]) for p in (source, out)
        )
        for feed in feeds[:2]:
            arguments = []
            for name, array in feed.items():
                np.save(self.folder / f"{name}.npy", array)
                arguments += ["--input", f"{name}={self.folder / f'{name}.npy'}"]
            weblane("run", out, *arguments, "--output", self.folder / "got")
            wanted = session.run(None, feed)
            plain = float_session.run(None, feed)
            for info, want, was in zip(session.get_outputs(), wanted, plain, strict=True):
                got = np.load(self.folder / "got" / f"{info.name}.npy")
                self.assertEqual(got.shape, want.shape)
                self.assertGreater(cosine(got, want), agreement, f"{info.name}: onnxruntime differs")
                self.assertGreater(cosine(want, was), least, f"{info.name}: far from the float model")
        return written, json.loads(report.read_text())

    def tokens(self):
        rng = np.random.default_rng(3)
        return [{"ids": rng.integers(0, 100, n)} for n in (5, 9, 12, 3)]

    def images(self):
        rng = np.random.default_rng(4)
        return [{"x": rng.standard_normal((1, 3, 16, 16)).astype(np.float32)} for _ in range(8)]

    def test_dynamic(self):
        for extra in ((), ("--per-tensor",), ("--keep-embeddings",)):
            with self.subTest(extra):
                written, report = self.check(
                    transformer(), self.tokens(), "--mode", "dynamic", "--reduce-range", *extra, least=0.998
                )
                self.assertEqual(sum(n.op_type == "MatMulInteger" for n in written.graph.node), 2)
                self.assertEqual(report["bytesAfter"], written.ByteSize())

    def test_weights_in_blocks(self):
        for mode, least in (("int4", 0.98), ("int8-weights", 0.9995)):
            for extra in ((), ("--asymmetric",), ("--block-size", "16"), ("--block-size", "64", "--asymmetric")):
                with self.subTest(mode=mode, extra=extra):
                    written, _ = self.check(transformer(), self.tokens(), "--mode", mode, *extra, least=least)
                    self.assertEqual(sum(n.op_type == "MatMulNBits" for n in written.graph.node), 2)

    def test_static(self):
        for extra in ((), ("--method", "percentile"), ("--method", "entropy"), ("--per-tensor",), ("--signed-activations",)):
            with self.subTest(extra):
                # One step of an 8-bit value is 0.4 percent; rounding of ties may differ by one.
                written, report = self.check(
                    convolutions(), self.images(), "--mode", "static", "--reduce-range", *extra, least=0.99, agreement=0.9995
                )
                kinds = [n.op_type for n in written.graph.node]
                self.assertNotIn("Relu", kinds)
                self.assertTrue(all(n["outputSqnrDb"] is None or n["outputSqnrDb"] > 10 for n in report["nodes"]))

    def test_digits(self):
        rng = np.random.default_rng(5)
        feeds = [{"input": rng.random((1, 1, 28, 28)).astype(np.float32)} for _ in range(6)]
        _, report = self.check(DIGITS, feeds, "--mode", "static", "--reduce-range", least=0.98, agreement=0.999)
        self.assertGreater(report["bytesBefore"], 2 * report["bytesAfter"])

    def test_half_precision(self):
        for model, feeds in ((transformer(), self.tokens()), (convolutions(), self.images())):
            written, _ = self.check(model, feeds, "--mode", "float16", least=0.9999, agreement=0.9999)
            self.assertFalse(any(t.data_type == TensorProto.FLOAT for t in written.graph.initializer))
            onnx.save(written, self.folder / "half.onnx")
            weblane("quantize", self.folder / "half.onnx", "-o", self.folder / "full.onnx", "--mode", "float32", "--quiet")
            full = onnx.load(self.folder / "full.onnx")
            self.assertFalse(any(t.data_type == TensorProto.FLOAT16 for t in full.graph.initializer))
            onnx.checker.check_model(full, full_check=True)

    def test_errors_name_what_is_wrong(self):
        onnx.save(transformer(), self.folder / "m.onnx")
        with self.assertRaisesRegex(AssertionError, "no node of the graph is called"):
            weblane("quantize", self.folder / "m.onnx", "-o", self.folder / "o.onnx", "--skip-node", "nobody")
        with self.assertRaisesRegex(AssertionError, "samples"):
            weblane("quantize", self.folder / "m.onnx", "-o", self.folder / "o.onnx", "--mode", "static")
        np.savez(self.folder / "odd.npz", odd=np.zeros(3))
        with self.assertRaisesRegex(AssertionError, 'inputs are "ids"'):
            weblane("quantize", self.folder / "m.onnx", "-o", self.folder / "o.onnx", "--calibration", self.folder / "odd.npz")


if __name__ == "__main__":
    unittest.main()
