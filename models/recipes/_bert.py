"""BERT-family encoders spelled out as torch.onnx (the TorchScript exporter, opset 14) writes
Hugging Face's eager models: shape arithmetic, decomposed LayerNorm and erf GELU included.

A `weight(name, shape)` callable gives the parameters, seeded or real; names are Hugging Face's.
"""

import math

import numpy as np
from onnx import numpy_helper

from ._graph import FLOAT, INT64, Graph

FLOAT_MIN = np.finfo(np.float32).min


class Encoder:
    """Writes the shared building blocks into a `Graph`."""

    def __init__(self, name, weight, hidden, heads, dynamic=("batch_size", "sequence_length")):
        self.g = Graph(name, 14, "weblane-models", "1")
        self.weight, self.hidden, self.heads, self.dynamic = weight, hidden, heads, dynamic

    def token_input(self, name):
        return self.g.input(name, INT64, list(self.dynamic))

    def parameter(self, name, shape):
        return self.g.init(name, self.weight(name, shape))

    def dim(self, x, axis, scope):
        """`x.size(axis)` as a scalar: Shape, Constant, Gather."""
        shape = self.g.node("Shape", [x], scope)
        return self.g.node("Gather", [shape, self.g.constant(axis, scope, "int64")], scope, axis=0)

    def concat_shape(self, parts, scope):
        """A shape vector from scalars (tensor names) and numbers: Unsqueeze each, then Concat."""
        rows = []
        for part in parts:
            if isinstance(part, str):
                axes = self.g.constant([0], scope, "int64")
                rows.append(self.g.node("Unsqueeze", [part, axes], scope))
            else:
                rows.append(self.g.constant([part], scope, "int64"))
        return self.g.node("Concat", rows, scope, axis=0)

    def embedding(self, ids, name, rows, scope):
        return self.g.node("Gather", [self.parameter(f"{name}.weight", (rows, self.hidden)), ids], scope)

    def position_ids(self, ids, length, scope):
        """`self.position_ids[:, :seq_length]`: a buffer of 0..length sliced by the input's length."""
        g = self.g
        buffer = g.init("embeddings.position_ids", np.arange(length, dtype=np.int64)[None])
        end = g.node("Unsqueeze", [self.dim(ids, 1, scope), g.constant([0], scope, "int64")], scope)
        start, axis, step = (g.constant([v], scope, "int64") for v in (0, 1, 1))
        return g.node("Slice", [buffer, start, end, axis, step], scope)

    def linear(self, x, name, cin, cout, scope):
        """`x @ W^T + b` on a 3-D input: MatMul with the transposed weight, then Add (bias first)."""
        g = self.g
        weight = g.init(f"onnx::MatMul_{name}", self.weight(f"{name}.weight", (cout, cin)).T)
        x = g.node("MatMul", [x, weight], scope)
        return g.node("Add", [self.parameter(f"{name}.bias", (cout,)), x], scope)

    def layer_norm(self, x, name, scope):
        g = self.g
        mean = g.node("ReduceMean", [x], scope, axes=[-1], keepdims=1)
        centred = g.node("Sub", [x, mean], scope)
        square = g.node("Pow", [centred, g.constant(2.0, scope, "float32")], scope)
        variance = g.node("ReduceMean", [square], scope, axes=[-1], keepdims=1)
        variance = g.node("Add", [variance, g.constant(1e-12, scope, "float32")], scope)
        x = g.node("Div", [centred, g.node("Sqrt", [variance], scope)], scope)
        x = g.node("Mul", [x, self.parameter(f"{name}.weight", (self.hidden,))], scope)
        return g.node("Add", [x, self.parameter(f"{name}.bias", (self.hidden,))], scope)

    def gelu(self, x, scope):
        """x * (1 + erf(x / sqrt 2)) * 0.5"""
        g = self.g
        erf = g.node("Erf", [g.node("Div", [x, g.constant(math.sqrt(2), scope, "float32")], scope)], scope)
        one = g.node("Add", [erf, g.constant(1.0, scope, "float32")], scope)
        return g.node("Mul", [g.node("Mul", [x, one], scope), g.constant(0.5, scope, "float32")], scope)

    def expand(self, x, shape, scope):
        """`x.expand(shape)`: torch's -1 (keep the size) is replaced at run time by 1."""
        g = self.g
        ones = g.node(
            "ConstantOfShape",
            [g.node("Shape", [shape], scope)],
            scope,
            value=numpy_helper.from_array(np.array([1], np.int64)),
        )
        minus = g.node("Mul", [ones, g.constant(-1, scope, "int64")], scope)
        keep = g.node("Equal", [shape, minus], scope)
        return g.node("Expand", [x, g.node("Where", [keep, ones, shape], scope)], scope)

    def mask_to_4d(self, mask):
        """`mask[:, None, None, :]`: one Unsqueeze per None."""
        g = self.g
        x = g.node("Unsqueeze", [mask, g.constant([1], "", "int64")])
        return g.node("Unsqueeze", [x, g.constant([2], "", "int64")])

    def extended_mask(self, mask, lowest):
        """`(1.0 - mask[:, None, None, :].float()) * lowest`"""
        g = self.g
        x = g.node("Cast", [self.mask_to_4d(mask)], to=FLOAT)
        x = g.node("Sub", [g.constant(1.0, "", "float32"), x])
        return g.node("Mul", [x, g.constant(lowest, "", "float32")])

    def bert_heads(self, x, scope, perm):
        """`transpose_for_scores`: [batch, seq, hidden] to [batch, heads, seq, head] (or perm)."""
        g = self.g
        shape = self.concat_shape(
            [self.dim(x, 0, scope), self.dim(x, 1, scope), self.heads, self.hidden // self.heads], scope
        )
        return g.node("Transpose", [g.node("Reshape", [x, shape], scope)], scope, perm=perm)

    def bert_layer(self, x, mask, name, intermediate):
        """One `BertLayer`, eager attention: scores / sqrt(head) + mask, Softmax."""
        g, hidden = self.g, self.hidden
        root = "/" + name.replace("encoder.layer.", "encoder/layer.")
        scope = f"{root}/attention/self"
        inner = f"{name}.attention.self"
        q = self.linear(x, f"{inner}.query", hidden, hidden, f"{scope}/query")
        k = self.linear(x, f"{inner}.key", hidden, hidden, f"{scope}/key")
        # torch.onnx folds key.transpose(-1, -2) into the heads' own transpose.
        k = self.bert_heads(k, scope, [0, 2, 3, 1])
        v = self.linear(x, f"{inner}.value", hidden, hidden, f"{scope}/value")
        v = self.bert_heads(v, scope, [0, 2, 1, 3])
        q = self.bert_heads(q, scope, [0, 2, 1, 3])
        scores = g.node("MatMul", [q, k], scope)
        root_head = g.constant(math.sqrt(hidden // self.heads), scope, "float32")
        scores = g.node("Div", [scores, root_head], scope)
        scores = g.node("Add", [scores, mask], scope)
        context = g.node("MatMul", [g.node("Softmax", [scores], scope, axis=-1), v], scope)
        context = g.node("Transpose", [context], scope, perm=[0, 2, 1, 3])
        shape = self.concat_shape([self.dim(context, 0, scope), self.dim(context, 1, scope), hidden], scope)
        context = g.node("Reshape", [context, shape], scope)

        scope = f"{root}/attention/output"
        y = self.linear(context, f"{name}.attention.output.dense", hidden, hidden, f"{scope}/dense")
        y = g.node("Add", [y, x], scope)
        x = self.layer_norm(y, f"{name}.attention.output.LayerNorm", f"{scope}/LayerNorm")

        y = self.linear(x, f"{name}.intermediate.dense", hidden, intermediate, f"{root}/intermediate/dense")
        y = self.gelu(y, f"{root}/intermediate/intermediate_act_fn")
        y = self.linear(y, f"{name}.output.dense", intermediate, hidden, f"{root}/output/dense")
        y = g.node("Add", [y, x], f"{root}/output")
        return self.layer_norm(y, f"{name}.output.LayerNorm", f"{root}/output/LayerNorm")

    def bert(self, ids, mask, types, layers, intermediate, vocab, lowest, output="last_hidden_state"):
        """Embeddings and encoder of `BertModel`; the last LayerNorm's output is named `output`."""
        g, scope = self.g, "/embeddings"
        extended = self.extended_mask(mask, lowest)
        positions = self.position_ids(ids, 512, scope)
        words = self.embedding(ids, "embeddings.word_embeddings", vocab, f"{scope}/word_embeddings")
        kinds = self.embedding(types, "embeddings.token_type_embeddings", 2, f"{scope}/token_type_embeddings")
        x = g.node("Add", [words, kinds], scope)
        places = self.embedding(positions, "embeddings.position_embeddings", 512, f"{scope}/position_embeddings")
        x = g.node("Add", [x, places], scope)
        x = self.layer_norm(x, "embeddings.LayerNorm", f"{scope}/LayerNorm")
        for layer in range(layers):
            x = self.bert_layer(x, extended, f"encoder.layer.{layer}", intermediate)
        return self.rename_last(output)

    def rename_last(self, name):
        """Gives the last node's output the name the exporter was asked for."""
        self.g.nodes[-1].output[0] = name
        return name

    def hidden_output(self, name):
        self.g.output(name, FLOAT, [*self.dynamic, self.hidden])


def seeded(weights):
    """Parameters of an encoder from `Weights`: He-initialised matrices, and norms and biases away
    from one and zero, so that a kernel that drops them is caught."""

    def weight(name, shape):
        if name.endswith(("LayerNorm.weight", "layer_norm.weight")):
            return weights.normal(name, shape, 0.1, mean=1.0)
        if name.endswith(".bias"):
            return weights.normal(name, shape, 0.1)
        if "embeddings" in name:
            return weights.normal(name, shape, 0.05)
        return weights.he(name, shape, shape[1])

    return weight


def token_sets(names, vocab):
    """Two sets of token inputs: 128 tokens, and 17 with padding at the end."""
    kinds = {"input_ids": ("tokens", vocab), "attention_mask": ("mask", None), "token_type_ids": ("types", None)}
    return [{name: ("int64", [1, length], kinds[name]) for name in names} for length in (128, 17)]
