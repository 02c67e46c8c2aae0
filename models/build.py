#!/usr/bin/env python3
"""Builds or fetches the models that tests, benches and the demo use.

Each lands in <out>/<name>/model.onnx beside a stamp.json with the recipe's hash; a model whose
stamp still matches is left alone. Names from manifest.json are fetched and verified.

    python models/build.py --list
    python models/build.py mobilenet_v2 minilm_l6
    python models/build.py --all --out target/models
"""

import argparse
import hashlib
import importlib
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

import fetch  # noqa: E402

RECIPES = (
    "mobilenet_v2",
    "efficientnet_lite0",
    "resnet50",
    "distilbert_base",
    "bert_base",
    "minilm_l6",
    "all_minilm_l6_v2",
    "digits",
    "mobilenet_v2_int8",
    "efficientnet_lite0_int8",
    "resnet50_int8",
    "minilm_l6_int8",
    "distilbert_base_int8",
    "distilgpt2",
    "distilgpt2_int8",
)


def sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recipe_hash(recipe):
    """Hash of everything the built file depends on: the sources and the pinned packages."""
    names = ["__init__", "_graph", *recipe.SHARED, recipe.NAME]
    sources = [ROOT / "recipes" / f"{name}.py" for name in names] + [ROOT / "requirements.txt"]
    sources += [ROOT / name for name in getattr(recipe, "FILES", ())]
    total = hashlib.sha256()
    for source in sources:
        total.update(hashlib.sha256(source.read_bytes()).digest())
    return total.hexdigest()


def check(recipe, path):
    """Refuses a model that ONNX rejects, or whose outputs are not finite, constant, or deaf to
    the input. Prints the spread of each output."""
    import numpy as np
    import onnx
    import onnxruntime

    from recipes import _inputs

    onnx.checker.check_model(str(path), full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    first, second = (session.run(None, _inputs.make(recipe.INPUT_SETS[0], seed)) for seed in (1, 2))
    for name, a, b in zip(names, first, second, strict=True):
        spread, change = float(np.std(a)), float(np.std(a - b))
        print(
            f"  {name} {list(a.shape)}: std {spread:.4g}, largest {np.abs(a).max():.4g}, "
            f"std of the change with the input {change:.4g}"
        )
        if not np.isfinite(a).all() or spread == 0 or not 0.01 < change / spread < 100:
            raise RuntimeError(f"{recipe.NAME}: output {name} is degenerate")


def build(name, out, force):
    recipe = importlib.import_module(f"recipes.{name}")
    directory = out / name
    directory.mkdir(parents=True, exist_ok=True)
    model, stamp = directory / "model.onnx", directory / "stamp.json"
    wanted = recipe_hash(recipe)
    if not force and model.exists() and stamp.exists():
        have = json.loads(stamp.read_text())
        if have["recipe"] == wanted and have["bytes"] == model.stat().st_size:
            print(f"{name}: up to date")
            return
    print(f"{name}: building ({recipe.ABOUT})", flush=True)
    start = time.monotonic()
    stamp.unlink(missing_ok=True)
    recipe.build(directory)
    check(recipe, model)
    record = {"recipe": wanted, "bytes": model.stat().st_size, "sha256": sha256(model)}
    stamp.write_text(json.dumps(record, indent=2) + "\n")
    print(f"{name}: {record['bytes']:,} bytes in {time.monotonic() - start:.1f} s, sha256 {record['sha256']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--out", type=Path, default=ROOT.parent / "target" / "models")
    parser.add_argument("--all", action="store_true", help="every recipe, and every model of the manifest")
    parser.add_argument("--list", action="store_true", help="print what there is, and stop")
    parser.add_argument("--force", action="store_true", help="build even when the stamp matches")
    parser.add_argument(
        "--retrain-digits", action="store_true", help="train models/digits.onnx anew, print its accuracy, and stop"
    )
    args = parser.parse_args()
    if args.retrain_digits:
        importlib.import_module("recipes.digits").train()
        return

    manifest = fetch.manifest()
    if args.list:
        for name in RECIPES:
            print(f"{name:20} {importlib.import_module(f'recipes.{name}').ABOUT}")
        for entry in manifest.values():
            print(f"{entry['name']:20} {entry['about']}, opset {entry['opset']} (fetched)")
        return
    names = [*RECIPES, *manifest] if args.all else args.names
    if not names:
        parser.error("name a model, or give --all or --list")
    unknown = [name for name in names if name not in RECIPES and name not in manifest]
    if unknown:
        parser.error(f"no such model: {', '.join(unknown)} (see --list)")

    failed = False
    for name in names:
        try:
            if name in manifest:
                print(f"{name}: {fetch.fetch(manifest[name], args.out)}")
            else:
                build(name, args.out, args.force)
        except (OSError, RuntimeError) as error:
            # The others are still worth having: say it in a line, go on, and end with an error; but
            # --all asks for a published model only where it can be had, and its tests skip themselves.
            print(f"{name}: {error}", file=sys.stderr)
            failed |= not (args.all and name in manifest)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
