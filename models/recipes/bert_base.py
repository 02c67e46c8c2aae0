"""BERT-base uncased (Devlin et al. 2018; 12 layers, hidden 768, 12 heads, 109.5 M parameters) with
its pooler, as torch.onnx exports Hugging Face's `BertModel` (eager attention), seeded weights."""

from ._bert import FLOAT_MIN, Encoder, seeded, token_sets
from ._graph import FLOAT, Weights

NAME = "bert_base"
ABOUT = "BERT-base with pooler, 109.5 M parameters, PyTorch style, dynamic axes, opset 14"
SHARED = ("_bert",)
VOCAB = 30522
TOKENS = ("input_ids", "attention_mask", "token_type_ids")
INPUT_SETS = token_sets(TOKENS, VOCAB)


def build(directory):
    e = Encoder("main_graph", seeded(Weights(NAME)), hidden=768, heads=12)
    g = e.g
    ids, mask, types = (e.token_input(name) for name in TOKENS)
    hidden = e.bert(ids, mask, types, 12, 3072, VOCAB, lowest=FLOAT_MIN)
    first = g.node("Gather", [hidden, g.constant(0, "/pooler", "int64")], "/pooler", axis=1)
    parameters = [e.parameter("pooler.dense.weight", (768, 768)), e.parameter("pooler.dense.bias", (768,))]
    x = g.node("Gemm", [first, *parameters], "/pooler/dense", alpha=1.0, beta=1.0, transB=1)
    g.node("Tanh", [x], "/pooler/activation", ["pooler_output"])
    e.hidden_output(hidden)
    g.output("pooler_output", FLOAT, ["batch_size", 768])
    g.save(directory / "model.onnx")
