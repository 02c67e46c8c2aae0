"""Tests of the recipes and tools. Models that have not been built are skipped, by name.

python -m unittest discover -s models
"""

import hashlib
import importlib
import os
import re
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

import build  # noqa: E402
import contrib  # noqa: E402
import export_conformance  # noqa: E402
import fetch  # noqa: E402
import goldens  # noqa: E402
import tensors  # noqa: E402
from recipes import _inputs, digits  # noqa: E402

MODELS = ROOT.parent / "target" / "models"


def built(name):
    path = MODELS / name / "model.onnx"
    if not path.exists():
        raise unittest.SkipTest(f"{path} is not there; build it with models/build.py {name}")
    return path


class Tensors(unittest.TestCase):
    def test_round_trip_of_every_kind_of_number(self):
        for dtype in (
            np.float32,
            np.float16,
            np.float64,
            np.int8,
            np.uint8,
            np.int16,
            np.uint16,
            np.int32,
            np.uint32,
            np.int64,
            np.uint64,
            np.bool_,
            ml_dtypes.bfloat16,
            ml_dtypes.float8_e4m3fn,
            ml_dtypes.uint4,
            ml_dtypes.int4,
        ):
            array = np.array([[1, 0, 1], [0, 1, 1]]).astype(dtype)
            again = tensors.decode(tensors.encode(array))
            self.assertEqual(again.dtype, array.dtype)
            np.testing.assert_array_equal(again.astype(np.float32), array.astype(np.float32))

    def test_layout(self):
        self.assertEqual(
            tensors.encode(np.array([1, -2], np.int32)), {"dtype": "int32", "dims": [2], "b64": "AQAAAP7///8="}
        )
        # The first nibble is the low one.
        self.assertEqual(tensors.encode(np.array([1, 2], ml_dtypes.uint4))["b64"], "IQ==")
        self.assertEqual(tensors.encode(np.float32(0))["dims"], [])
        self.assertEqual(
            tensors.encode(np.array(["é", ""], object)), {"dtype": "string", "dims": [2], "strings": ["é", ""]}
        )

    def test_typed_fields_become_raw(self):
        proto = helper.make_tensor("x", TensorProto.FLOAT16, [2], [1.0, -2.0])
        self.assertFalse(proto.HasField("raw_data"))
        np.testing.assert_array_equal(tensors.decode(tensors.encode(proto)), np.array([1, -2], np.float16))


class Fetch(unittest.TestCase):
    GOOD = b"a model"
    ENTRY = {
        "name": "m",
        "bytes": len(GOOD),
        "sha256": hashlib.sha256(GOOD).hexdigest(),
        "url": "http://127.0.0.1:9/m.onnx",
    }

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.mirror, self.cache = Path(folder.name) / "mirror", Path(folder.name) / "cache"
        environment = mock.patch.dict(os.environ, {fetch.MIRROR_VARIABLE: str(self.mirror)})
        environment.start()
        self.addCleanup(environment.stop)

    @staticmethod
    def put(root, data):
        (root / "m").mkdir(parents=True)
        (root / "m" / "model.onnx").write_bytes(data)

    def test_mirror_before_cache(self):
        self.put(self.mirror, self.GOOD)
        self.put(self.cache, self.GOOD)
        self.assertEqual(fetch.fetch(self.ENTRY, self.cache), self.mirror / "m" / "model.onnx")

    def test_a_changed_byte_is_refused(self):
        self.put(self.mirror, b"a mOdel")
        self.put(self.cache, self.GOOD)
        self.assertEqual(fetch.fetch(self.ENTRY, self.cache), self.cache / "m" / "model.onnx")

    def test_download_is_verified_and_kept(self):
        with mock.patch("urllib.request.urlopen", return_value=_Response(b"a mOdel")):
            with self.assertRaisesRegex(RuntimeError, "SHA-256"):
                fetch.fetch(self.ENTRY, self.cache)
        self.assertFalse((self.cache / "m").exists())
        with mock.patch("urllib.request.urlopen", return_value=_Response(self.GOOD)):
            self.assertEqual(fetch.fetch(self.ENTRY, self.cache).read_bytes(), self.GOOD)

    def test_nowhere_is_one_line(self):
        with self.assertRaises(RuntimeError) as caught:
            fetch.fetch(self.ENTRY, self.cache)
        self.assertRegex(str(caught.exception), r"^not to be had: [^\n]+$")

    def test_manifest_is_complete(self):
        for name, entry in fetch.manifest().items():
            self.assertEqual(set(entry), {"name", "about", "opset", "licence", "bytes", "sha256", "url"})
            self.assertTrue(re.fullmatch("[0-9a-f]{64}", entry["sha256"]), name)
            self.assertTrue(entry["url"].startswith("https://"), name)


class _Response:
    def __init__(self, data):
        self.data = data

    def read(self, limit):
        return self.data[:limit]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


class Architectures(unittest.TestCase):
    # Published parameter counts: torchvision and Hugging Face's models. BatchNorm's running statistics
    # (2 per channel, not trained) are counted where they are initializers.
    PARAMETERS = {
        # 3,504,872 with 34,112 BatchNorm gains and shifts; folding leaves one bias for each pair.
        "mobilenet_v2": 3_504_872 - 17_056,
        "efficientnet_lite0": 4_652_008 + 2 * 21_008,
        "resnet50": 25_557_032 + 53_120,
        "minilm_l6": 22_713_216 - 384 * 384 - 384,
        "all_minilm_l6_v2": 22_713_216 - 384 * 384 - 384,
        "distilbert_base": 66_362_880,
        "bert_base": 109_482_240,
        "distilgpt2": 81_912_576,
    }

    def test_parameter_counts(self):
        for name, wanted in self.PARAMETERS.items():
            with self.subTest(name):
                model = onnx.load(built(name))
                counted = sum(
                    int(np.prod(tensor.dims))
                    for tensor in model.graph.initializer
                    # Scalars are bounds of Clip.
                    if tensor.data_type == TensorProto.FLOAT and len(tensor.dims)
                )
                self.assertEqual(counted, wanted)

    def test_goldens_room(self):
        for name in ("mobilenet_v2", "efficientnet_lite0", "minilm_l6", "digits"):
            with self.subTest(name):
                record, used = goldens.golden(built(name), name, {})
                self.assertLess(used, goldens.ROOM)
                first, second = (tensors.decode(s["outputs"][0]) for s in record["sets"])
                # A golden that any input meets would test nothing.
                if first.shape == second.shape:
                    bound = record["atol"] + record["rtol"] * np.abs(second)
                    self.assertGreater((np.abs(first - second) > bound).mean(), 0.5)

    def test_a_set_of_inputs_is_reproducible(self):
        for name in build.RECIPES:
            spec = importlib.import_module(f"recipes.{name}").INPUT_SETS[1]
            one, two, other = (_inputs.make(spec, seed) for seed in (3, 3, 4))
            self.assertTrue(all(np.array_equal(one[k], two[k]) for k in one))
            self.assertFalse(all(np.array_equal(one[k], other[k]) for k in one))


class Contrib(unittest.TestCase):
    def test_goldens_are_reproducible_and_say_something(self):
        for name in ("qgemm", "matmul_4bits", "dynamic_quantize_lstm"):
            with self.subTest(name):
                (model, record), again = (contrib.golden(contrib.FAMILIES[name]()) for _ in range(2))
                self.assertEqual((model, record), again)
                for one, two in zip(*(s["outputs"] for s in record["sets"]), strict=True):
                    one, two = (tensors.decode(entry).astype(np.float64) for entry in (one, two))
                    bound = record["atol"] + record["rtol"] * np.abs(two)
                    self.assertGreater((np.abs(one - two) > bound).mean(), 0.5)


class Sentences(unittest.TestCase):
    def test_similarities_as_the_model_card_gives_them(self):
        """The hosted model's answer for these sentences: 0.695, 0.943, 0.257."""
        path = built("all_minilm_l6_v2")
        vocabulary = {word: n for n, word in enumerate((path.parent / "vocab.txt").read_text().split("\n"))}
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

        def embed(*sentences):
            rows = [[101, *(vocabulary[word] for word in s.lower().split()), 102] for s in sentences]
            width = max(map(len, rows))
            feed = {
                "input_ids": np.array([row + [0] * (width - len(row)) for row in rows]),
                "attention_mask": np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
                "token_type_ids": np.zeros((len(rows), width), np.int64),
            }
            return session.run(["sentence_embedding"], feed)[0]

        # As one batch with padding, so the mask counts.
        e = embed(
            "That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day"
        )
        np.testing.assert_allclose(np.linalg.norm(e, axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(e[1:] @ e[0], [0.695, 0.943, 0.257], atol=1e-3)
        np.testing.assert_allclose(embed("That is a happy person")[0], e[0], atol=1e-5)


class Digits(unittest.TestCase):
    def test_held_out_accuracy(self):
        _, _, images, labels = digits.split()
        session = onnxruntime.InferenceSession(str(ROOT / "digits.onnx"), providers=["CPUExecutionProvider"])
        guesses = [session.run(None, {"input": digits.enlarge(image)[None, None]})[0].argmax() for image in images]
        self.assertGreater(np.mean(np.array(guesses) == labels), 0.98)

    def test_gradients(self):
        """Backward against central differences of a double-precision forward."""
        rng = np.random.default_rng(0)
        parameters = [p.astype(np.float64) for p in digits.fresh_parameters(rng)]
        x = rng.random((2, 28, 28, 1))
        logits, tape = digits.forward(parameters, x)
        direction = rng.standard_normal(logits.shape)
        gradients = digits.backward(parameters, tape, direction)
        for index, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            place = np.unravel_index(int(np.abs(gradient).argmax()), parameter.shape)
            values, original = [], parameter[place]
            for delta in (1e-6, -1e-6):
                parameter[place] = original + delta
                values.append((digits.forward(parameters, x)[0] * direction).sum())
            parameter[place] = original
            slope = (values[0] - values[1]) / 2e-6
            self.assertLess(abs(slope - gradient[place]) / abs(slope), 1e-3, f"parameter {index}")


class Conformance(unittest.TestCase):
    def test_operators_of_subgraphs_are_listed(self):
        branch = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "b", [], [])
        node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
        odd = helper.make_node("Odd", ["y"], ["z"], domain="my")
        model = helper.make_model(helper.make_graph([node, odd], "g", [], []))
        self.assertEqual(export_conformance.operators(model), ["If", "Relu", "my::Odd"])

    def test_compare_refuses(self):
        want = {"kind": "tensor", **tensors.encode(np.array([1, np.nan, np.inf], np.float32))}
        compare = export_conformance.compare
        compare(np.array([1.0005, np.nan, np.inf], np.float32), want, 1e-3, 1e-7)
        for wrong in (
            np.array([1.002, np.nan, np.inf], np.float32),
            np.array([1, 0, np.inf], np.float32),
            np.array([1, np.nan, -np.inf], np.float32),
            np.array([1, np.nan, np.inf], np.float64),
            np.array([[1, np.nan, np.inf]], np.float32),
        ):
            with self.assertRaises(AssertionError):
                compare(wrong, want, 1e-3, 1e-7)


if __name__ == "__main__":
    unittest.main()
