"""DistilGPT-2 (Sanh et al. 2019; 6 layers, hidden 768, 12 heads, 81.9 M parameters), as optimum exports Hugging
Face's `GPT2LMHeadModel` with a cache: one step takes the keys and values of all tokens before it and gives those with
the new ones. What lies ahead is hidden by a Where, padding by a mask that is added after it."""

import math

import numpy as np
from onnx import TensorProto

from ._bert import FLOAT_MIN, Encoder
from ._graph import FLOAT, INT64, Weights

NAME = "distilgpt2"
ABOUT = "DistilGPT-2, 81.9 M parameters, PyTorch style, with a cache, opset 14"
SHARED = ("_bert",)
VOCAB, POSITIONS = 50257, 1024
LAYERS, HIDDEN, HEADS = 6, 768, 12
SIZE = HIDDEN // HEADS
PAST = [f"past_key_values.{n}.{part}" for n in range(LAYERS) for part in ("key", "value")]


def inputs(tokens, past):
    """Token inputs after a cache of so many tokens."""
    return {
        "input_ids": ("int64", [1, tokens], ("tokens", VOCAB)),
        "attention_mask": ("int64", [1, past + tokens], ("ones", None)),
        **{name: ("float", [1, HEADS, past, SIZE], ("normal", None)) for name in PAST},
    }


INPUT_SETS = [inputs(1, 40), inputs(7, 6)]


def parameter(weights):
    def weight(name, shape):
        if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
            return weights.normal(name, shape, 0.1, mean=1.0)
        if name.endswith(".bias"):
            return weights.normal(name, shape, 0.1)
        if name.startswith(("transformer.wte", "transformer.wpe")):
            return weights.normal(name, shape, 0.05)
        # GPT-2's matrices are stored [in, out].
        return weights.he(name, shape, shape[0], gain=1.0)

    return weight


class Decoder(Encoder):
    """The blocks of GPT-2."""

    def conv1d(self, x, name, cin, cout, scope, lead):
        """`Conv1D`: a Gemm on two axes, between two reshapes."""
        g = self.g
        flat = g.node("Reshape", [x, g.constant([-1, cin], scope, "int64")], scope)
        weight, bias = (self.parameter(f"{name}.{part}", dims) for part, dims in self.dims(cin, cout))
        y = g.node("Gemm", [flat, weight, bias], scope, alpha=1.0, beta=1.0)
        return g.node("Reshape", [y, self.concat_shape([*lead, cout], scope)], scope)

    @staticmethod
    def dims(cin, cout):
        return (("weight", (cin, cout)), ("bias", (cout,)))

    def gelu_new(self, x, scope):
        """0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))"""
        g = self.g

        def number(value):
            return g.constant(value, scope, "float32")

        cubed = g.node("Mul", [g.node("Pow", [x, number(3.0)], scope), number(0.044715)], scope)
        inner = g.node("Mul", [g.node("Add", [x, cubed], scope), number(math.sqrt(2 / math.pi))], scope)
        one = g.node("Add", [g.node("Tanh", [inner], scope), number(1.0)], scope)
        return g.node("Mul", [g.node("Mul", [x, number(0.5)], scope), one], scope)

    def cut(self, x, start, end, axis, scope):
        """`x[..., start:end, ...]` for scalars that the graph computes."""
        g = self.g
        start, end = (g.node("Unsqueeze", [v, g.constant([0], scope, "int64")], scope) for v in (start, end))
        axis, step = (g.constant([v], scope, "int64") for v in (axis, 1))
        return g.node("Slice", [x, start, end, axis, step], scope)

    def attention(self, x, mask, table, n, lead):
        g, scope, name = self.g, f"/transformer/h.{n}/attn", f"transformer.h.{n}.attn"
        qkv = self.conv1d(x, f"{name}.c_attn", HIDDEN, 3 * HIDDEN, f"{scope}/c_attn", lead)
        parts = [f"{scope}/Split_output_{i}" for i in range(3)]
        g.node("Split", [qkv, g.constant([HIDDEN] * 3, scope, "int64")], scope, outputs=parts, axis=2)

        def heads(part):
            shape = self.concat_shape([*lead, HEADS, SIZE], scope)
            return g.node("Transpose", [g.node("Reshape", [part, shape], scope)], scope, perm=[0, 2, 1, 3])

        q, k, v = (heads(part) for part in parts)
        k, v = (
            g.node("Concat", [f"past_key_values.{n}.{part}", x], scope, outputs=[f"present.{n}.{part}"], axis=-2)
            for part, x in (("key", k), ("value", v))
        )
        turned = g.node("Transpose", [k], scope, perm=[0, 1, 3, 2])
        scores = g.node("MatMul", [q, turned], scope)
        scores = g.node("Div", [scores, g.constant(math.sqrt(SIZE), scope, "float32")], scope)
        queries, keys = self.dim(q, 2, scope), self.dim(k, 2, scope)
        begin, zero = g.node("Sub", [keys, queries], scope), g.constant(0, scope, "int64")
        seen = self.cut(self.cut(table, begin, keys, 2, scope), zero, keys, 3, scope)
        seen = g.node("Cast", [seen], scope, to=TensorProto.BOOL)
        scores = g.node("Where", [seen, scores, g.constant(FLOAT_MIN, scope, "float32")], scope)
        scores = g.node("Add", [scores, mask], scope)
        y = g.node("MatMul", [g.node("Softmax", [scores], scope, axis=-1), v], scope)
        y = g.node("Transpose", [y], scope, perm=[0, 2, 1, 3])
        y = g.node("Reshape", [y, self.concat_shape([*lead, HIDDEN], scope)], scope)
        return self.conv1d(y, f"{name}.c_proj", HIDDEN, HIDDEN, f"{scope}/c_proj", lead)

    def block(self, x, mask, table, n, lead):
        g, scope, name = self.g, f"/transformer/h.{n}", f"transformer.h.{n}"
        y = self.layer_norm(x, f"{name}.ln_1", f"{scope}/ln_1")
        x = g.node("Add", [self.attention(y, mask, table, n, lead), x], scope)
        y = self.layer_norm(x, f"{name}.ln_2", f"{scope}/ln_2")
        y = self.conv1d(y, f"{name}.mlp.c_fc", HIDDEN, 4 * HIDDEN, f"{scope}/mlp/c_fc", lead)
        y = self.gelu_new(y, f"{scope}/mlp/act")
        y = self.conv1d(y, f"{name}.mlp.c_proj", 4 * HIDDEN, HIDDEN, f"{scope}/mlp/c_proj", lead)
        return g.node("Add", [x, y], scope)


def build(directory):
    dynamic = ("batch_size", "sequence_length")
    e = Decoder("main_graph", parameter(Weights(NAME)), HIDDEN, HEADS, dynamic)
    g, scope = e.g, "/transformer"
    ids = g.input("input_ids", INT64, list(dynamic))
    mask = g.input("attention_mask", INT64, ["batch_size", "past_sequence_length + sequence_length"])
    for name in PAST:
        g.input(name, FLOAT, ["batch_size", HEADS, "past_sequence_length", SIZE])
    batch, length = e.dim(ids, 0, scope), e.dim(ids, 1, scope)
    past = e.dim(PAST[0], 2, scope)
    total = g.node("Add", [length, past], scope)
    places = g.node("Range", [past, total, g.constant(1, scope, "int64")], scope)
    places = g.node("Unsqueeze", [places, g.constant([0], scope, "int64")], scope)
    words = e.embedding(ids, "transformer.wte", VOCAB, f"{scope}/wte")
    x = g.node("Add", [words, e.embedding(places, "transformer.wpe", POSITIONS, f"{scope}/wpe")], scope)
    table = g.init("transformer.h.0.attn.bias", np.tril(np.ones((1, 1, POSITIONS, POSITIONS), np.uint8)))
    mask = e.extended_mask(mask, FLOAT_MIN)
    for n in range(LAYERS):
        x = e.block(x, mask, table, n, [batch, length])
    x = e.layer_norm(x, "transformer.ln_f", f"{scope}/ln_f")
    # The words once more: weights that are shared are stored once.
    words = g.node("Transpose", ["transformer.wte.weight"], "/lm_head", perm=[1, 0])
    g.node("MatMul", [x, words], "/lm_head")
    g.output(e.rename_last("logits"), FLOAT, [*dynamic, VOCAB])
    for name in PAST:
        total = "past_sequence_length + sequence_length"
        g.output(name.replace("past_key_values", "present"), FLOAT, ["batch_size", HEADS, total, SIZE])
    g.save(directory / "model.onnx")
