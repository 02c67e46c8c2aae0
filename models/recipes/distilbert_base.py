"""DistilBERT base uncased (Sanh et al. 2019; 6 layers, hidden 768, 12 heads, 66.4 M parameters), as
torch.onnx exports Hugging Face's `DistilBertModel`: the mask goes through Equal, Expand and Where."""

import math

from onnx import TensorProto

from ._bert import FLOAT_MIN, Encoder, seeded, token_sets
from ._graph import Weights

NAME = "distilbert_base"
ABOUT = "DistilBERT base, 66.4 M parameters, PyTorch style, dynamic axes, opset 14"
SHARED = ("_bert",)
VOCAB = 30522
TOKENS = ("input_ids", "attention_mask")
INPUT_SETS = token_sets(TOKENS, VOCAB)
HIDDEN, HEADS = 768, 12


def layer(e, x, mask, n):
    g = e.g
    root, name = f"/transformer/layer.{n}", f"transformer.layer.{n}"
    scope = f"{root}/attention"
    batch = e.dim(x, 0, scope)
    length = e.dim(x, 1, scope)

    def heads(part, perm):
        y = e.linear(x, f"{name}.attention.{part}", HIDDEN, HIDDEN, f"{scope}/{part}")
        shape = e.concat_shape([batch, -1, HEADS, HIDDEN // HEADS], scope)
        return g.node("Transpose", [g.node("Reshape", [y, shape], scope)], scope, perm=perm)

    q = heads("q_lin", [0, 2, 1, 3])
    k = heads("k_lin", [0, 2, 3, 1])
    v = heads("v_lin", [0, 2, 1, 3])
    # DistilBERT scales the query, BERT the scores.
    q = g.node("Div", [q, g.constant(math.sqrt(HIDDEN // HEADS), scope, "float32")], scope)
    scores = g.node("MatMul", [q, k], scope)
    masked = g.node("Equal", [mask, g.constant(0, scope, "int64")], scope)
    masked = g.node("Reshape", [masked, e.concat_shape([batch, 1, 1, length], scope)], scope)
    masked = e.expand(masked, g.node("Shape", [scores], scope), scope)
    masked = g.node("Cast", [masked], scope, to=TensorProto.BOOL)
    scores = g.node("Where", [masked, g.constant(FLOAT_MIN, scope, "float32"), scores], scope)
    context = g.node("MatMul", [g.node("Softmax", [scores], scope, axis=-1), v], scope)
    context = g.node("Transpose", [context], scope, perm=[0, 2, 1, 3])
    context = g.node("Reshape", [context, e.concat_shape([batch, -1, HIDDEN], scope)], scope)
    y = e.linear(context, f"{name}.attention.out_lin", HIDDEN, HIDDEN, f"{scope}/out_lin")
    x = e.layer_norm(g.node("Add", [y, x], root), f"{name}.sa_layer_norm", f"{root}/sa_layer_norm")
    y = e.linear(x, f"{name}.ffn.lin1", HIDDEN, 4 * HIDDEN, f"{root}/ffn/lin1")
    y = e.gelu(y, f"{root}/ffn/activation")
    y = e.linear(y, f"{name}.ffn.lin2", 4 * HIDDEN, HIDDEN, f"{root}/ffn/lin2")
    return e.layer_norm(g.node("Add", [y, x], root), f"{name}.output_layer_norm", f"{root}/output_layer_norm")


def build(directory):
    e = Encoder("main_graph", seeded(Weights(NAME)), HIDDEN, HEADS)
    g, scope = e.g, "/embeddings"
    ids, mask = (e.token_input(name) for name in TOKENS)
    positions = e.position_ids(ids, 512, scope)
    words = e.embedding(ids, "embeddings.word_embeddings", VOCAB, f"{scope}/word_embeddings")
    places = e.embedding(positions, "embeddings.position_embeddings", 512, f"{scope}/position_embeddings")
    x = g.node("Add", [words, places], scope)
    x = e.layer_norm(x, "embeddings.LayerNorm", f"{scope}/LayerNorm")
    for n in range(6):
        x = layer(e, x, mask, n)
    e.hidden_output(e.rename_last("last_hidden_state"))
    g.save(directory / "model.onnx")
