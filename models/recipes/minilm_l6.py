"""MiniLM-L6 (6 layers, hidden 384, 12 heads, 22.6 M parameters), the encoder of
all-MiniLM-L6-v2 as optimum exports it, with seeded weights."""

from ._bert import Encoder, seeded, token_sets
from ._graph import Weights

NAME = "minilm_l6"
ABOUT = "MiniLM-L6 encoder, 22.6 M parameters, optimum style, dynamic axes, opset 14"
SHARED = ("_bert",)
VOCAB = 30522
TOKENS = ("input_ids", "attention_mask", "token_type_ids")
INPUT_SETS = token_sets(TOKENS, VOCAB)


def build(directory):
    e = Encoder("main_graph", seeded(Weights(NAME)), hidden=384, heads=12)
    ids, mask, types = (e.token_input(name) for name in TOKENS)
    e.hidden_output(e.bert(ids, mask, types, 6, 1536, VOCAB, lowest=-10000.0))
    e.g.save(directory / "model.onnx")
