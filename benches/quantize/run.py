#!/usr/bin/env python3
"""What the quantiser does to two models with real weights; `cargo xtask bench quantize` builds what this needs.

all-MiniLM-L6-v2      200 sentences of the demo, one run each: cosine of the quantised model's embeddings to the float
                      model's, both in weblane; size of the files; the first three of the demo's examples, found among
                      all of its sentences as its search page does it.
squeezenet            the published float16 file, converted to float32, then quantised statically with crops of the
                      samples: classes of two pictures. The cells of a row differ in how ranges are found.

Each bound is checked, and the script fails when one does not hold.

    python benches/quantize/run.py [--only minilm|squeezenet] [--record FILE]
"""

import argparse
import json
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "models"))

import fetch  # noqa: E402

WEBLANE = Path(os.environ.get("WEBLANE") or ROOT / "target" / "release" / "weblane")
MINILM = ROOT / "target" / "models" / "all_minilm_l6_v2"
OUT = ROOT / "target" / "quantize"
SENTENCES = 200
# Options of each mode, and what has to hold: mean cosine, bytes of the file.
MODES = {"dynamic": ((), 0.99, 24e6), "int4": (("--asymmetric",), 0.97, 20e6)}
PICTURES = {"kitten.png": 281, "hummingbird.jpg": 94}


def weblane(*args):
    """Runs the program; its output."""
    done = subprocess.run([str(WEBLANE), *map(str, args)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"weblane {' '.join(map(str, args))}: {done.stderr.strip()}")
    return done.stdout


class Tokenizer:
    """BERT's, lower case: words and punctuation, then the longest pieces of the vocabulary from the left."""

    def __init__(self, path):
        self.ids = {word: n for n, word in enumerate(path.read_text(encoding="utf-8").split("\n"))}

    def __call__(self, text):
        plain = unicodedata.normalize("NFD", text.lower())
        plain = "".join(c for c in plain if unicodedata.category(c) != "Mn")
        ids = [self.ids["[CLS]"]]
        for word in re.findall(r"\w+|[^\w\s]", plain):
            ids += self.pieces(word)
        return [*ids, self.ids["[SEP]"]]

    def pieces(self, word):
        found, start = [], 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in self.ids:
                    found.append(self.ids[piece])
                    start = end
                    break
            else:
                return [self.ids["[UNK]"]]
        return found


def feeds(rows):
    """Token lists as one padded batch."""
    width = max(map(len, rows))
    return {
        "input_ids": np.array([row + [0] * (width - len(row)) for row in rows], np.int64),
        "attention_mask": np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows], np.int64),
        "token_type_ids": np.zeros((len(rows), width), np.int64),
    }


def embed(model, rows, batch=16):
    """Embeddings by the program, in batches of similar length."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    embeddings = np.zeros((len(rows), 384), np.float32)
    folder = OUT / "embed"
    folder.mkdir(parents=True, exist_ok=True)
    for at in range(0, len(order), batch):
        part = order[at : at + batch]
        arguments = []
        for name, array in feeds([rows[i] for i in part]).items():
            np.save(folder / f"{name}.npy", array)
            arguments += ["--input", f"{name}={folder / f'{name}.npy'}"]
        weblane("run", model, *arguments, "--output", folder / "out")
        embeddings[part] = np.load(folder / "out" / "sentence_embedding.npy")
    return embeddings


def strings(path, pattern):
    return [json.loads(f'"{text}"') for text in re.findall(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)]


def minilm(failures):
    tokenizer = Tokenizer(MINILM / "vocab.txt")
    sentences = strings(ROOT / "demo-site/src/sentences.ts", r'^  "((?:[^"\\]|\\.)*)",$')
    queries = strings(ROOT / "demo-site/index.html", r"data-example>([^<]+)<")
    if len(sentences) < SENTENCES or len(queries) < 3:
        raise RuntimeError(f"{len(sentences)} sentences and {len(queries)} examples were found")
    samples = OUT / "minilm"
    samples.mkdir(parents=True, exist_ok=True)
    for old in samples.glob("*.npz"):
        old.unlink()
    for i, text in enumerate(sentences[:SENTENCES]):
        np.savez(samples / f"{i:03}.npz", **feeds([tokenizer(text)]))

    rows = [tokenizer(text) for text in sentences + queries]

    def top(model):
        e = embed(model, rows)
        scores = e[len(sentences) :] @ e[: len(sentences)].T
        return [[sentences[i] for i in np.argsort(-row, kind="stable")[:3]] for row in scores]

    wanted = top(MINILM / "model.onnx")
    cells = []
    for mode, (options, least, most) in MODES.items():
        path, report = OUT / f"minilm_{mode}.onnx", OUT / f"minilm_{mode}.json"
        weblane(
            "quantize", MINILM / "model.onnx", "--mode", mode, *options, "-o", path, "--calibration", samples,
            "--report", report, "--quiet",
        )  # fmt: skip
        output = next(o for o in json.loads(report.read_text())["outputs"] if o["name"] == "sentence_embedding")
        same = [got == want for got, want in zip(top(path), wanted, strict=True)]
        cell = {
            "mode": " ".join([mode, *options]),
            "sentences": output["samples"],
            "cosine": round(output["cosine"], 5),
            "least_cosine": round(output["minCosine"], 5),
            "bytes": path.stat().st_size,
            "float_bytes": (MINILM / "model.onnx").stat().st_size,
            "examples": len(queries),
            "examples_with_same_top_3": sum(same),
        }
        cells.append(cell)
        print(json.dumps(cell))
        if cell["cosine"] < least:
            failures.append(f"{mode}: cosine {cell['cosine']}, at least {least} was wanted")
        if cell["bytes"] > most:
            failures.append(f"{mode}: {cell['bytes']} bytes, at most {most:.0f} were wanted")
        if mode == "dynamic" and not all(same):
            failures.append("dynamic: the first three of an example differ from those of the float model")
    return cells


def square(image, left, top, size):
    """A crop as squeezenet wants it: 224 x 224, BGR, 0..255, channels first."""
    from PIL import Image

    crop = image.convert("RGB").crop((left, top, left + size, top + size)).resize((224, 224), Image.BILINEAR)
    return np.asarray(crop, np.float32)[:, :, ::-1].transpose(2, 0, 1)[None].copy()


def centre(image):
    size = min(image.size)
    return square(image, (image.width - size) // 2, (image.height - size) // 2, size)


def squeezenet(failures):
    from PIL import Image

    folder = Path(os.environ.get("WEBLANE_SAMPLES") or ROOT.parent / "shared" / "samples")
    if not folder.is_dir():
        raise RuntimeError(f"the samples are not in {folder}; WEBLANE_SAMPLES names their folder")
    half = fetch.fetch(fetch.manifest()["squeezenet_fp16"], ROOT / "target" / "models")
    plain = OUT / "squeezenet_float32.onnx"
    weblane("quantize", half, "--mode", "float32", "-o", plain, "--quiet")
    samples = OUT / "squeezenet"
    samples.mkdir(parents=True, exist_ok=True)
    for old in samples.glob("*.npy"):
        old.unlink()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".jpg", ".png")):
        image = Image.open(path)
        np.save(samples / f"{path.stem}_centre.npy", centre(image))
        # Four more of each picture, two thirds as wide.
        size = min(image.size) * 2 // 3
        for i in range(4):
            left, top = (image.width - size) * (i % 2), (image.height - size) * (i // 2)
            np.save(samples / f"{path.stem}_{i}.npy", square(image, left, top, size))
    input_name = re.search(r"^input +(\S+)", weblane("inspect", plain), re.MULTILINE)
    cells = []
    for method in ("minmax", "percentile", "entropy"):
        path, report = OUT / f"squeezenet_{method}.onnx", OUT / f"squeezenet_{method}.json"
        weblane(
            "quantize", plain, "--mode", "static", "--method", method, "-o", path, "--calibration", samples,
            "--report", report, "--quiet",
        )  # fmt: skip
        output = json.loads(report.read_text())["outputs"][0]
        classes = {}
        for name in PICTURES:
            array = OUT / "picture.npy"
            np.save(array, centre(Image.open(folder / name)))
            weblane("run", path, "--input", f"{input_name.group(1)}={array}", "--output", OUT / "classes")
            classes[name] = int(np.load(next((OUT / "classes").glob("*.npy"))).ravel().argmax())
        cell = {
            "mode": "static",
            "method": method,
            "samples": output["samples"],
            "cosine": round(output["cosine"], 5),
            "top1_agreement": output["top1"],
            "classes": classes,
            "bytes": path.stat().st_size,
            "float_bytes": plain.stat().st_size,
        }
        cells.append(cell)
        print(json.dumps(cell))
        if classes != PICTURES:
            failures.append(f"squeezenet, {method}: classes {classes}, wanted {PICTURES}")
    return cells


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["minilm", "squeezenet"])
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    failures, record = [], {}
    for name, run in (("minilm", minilm), ("squeezenet", squeezenet)):
        if args.only in (None, name):
            record[name] = run(failures)
    if args.record and not failures:
        args.record.write_text(json.dumps(record, indent=2) + "\n")
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
