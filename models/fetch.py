#!/usr/bin/env python3
"""Finds the published models of manifest.json: in a local mirror, in the cache, or at their address.

The mirror is the directory WEBLANE_MODEL_MIRROR, by default ../shared/models beside the project,
laid out as <name>/model.onnx; the cache is <out>/<name>/model.onnx. The SHA-256 is verified always.

    python models/fetch.py mnist silero_vad_v5      # prints each model's path
"""

import argparse
import hashlib
import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent
MIRROR_VARIABLE = "WEBLANE_MODEL_MIRROR"
TIMEOUT_SECONDS = 30


def manifest():
    """{name: {name, about, url, sha256, bytes, licence, opset}}"""
    entries = json.loads((ROOT / "manifest.json").read_text())["models"]
    return {entry["name"]: entry for entry in entries}


def mismatch(data, entry):
    """What is wrong with these bytes, or None."""
    if len(data) != entry["bytes"]:
        return f"{len(data)} bytes, wanted {entry['bytes']}"
    digest = hashlib.sha256(data).hexdigest()
    return None if digest == entry["sha256"] else f"SHA-256 {digest}, wanted {entry['sha256']}"


def fetch(entry, out):
    """The path of a verified copy. Raises RuntimeError, with one line that says where it looked."""
    name = entry["name"]
    mirror = Path(os.environ.get(MIRROR_VARIABLE) or ROOT.parent.parent / "shared" / "models")
    cached = out / name / "model.onnx"
    tried = []
    for path in (mirror / name / "model.onnx", cached):
        if not path.is_file():
            tried.append(f"no {path}")
            continue
        wrong = mismatch(path.read_bytes(), entry)
        if wrong is None:
            return path
        tried.append(f"{path} has {wrong}")
    try:
        with urllib.request.urlopen(entry["url"], timeout=TIMEOUT_SECONDS) as response:
            # One byte more than wanted is enough to know that it is the wrong file.
            data = response.read(entry["bytes"] + 1)
    except (urllib.error.URLError, OSError) as error:
        raise RuntimeError(f"not to be had: {'; '.join(tried)}; {entry['url']}: {error}") from error
    wrong = mismatch(data, entry)
    if wrong is not None:
        raise RuntimeError(f"not to be had: {'; '.join(tried)}; {entry['url']} has {wrong}")
    cached.parent.mkdir(parents=True, exist_ok=True)
    partial = cached.with_suffix(".part")
    partial.write_bytes(data)
    partial.replace(cached)
    return cached


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all of the manifest")
    parser.add_argument("--out", type=Path, default=ROOT.parent / "target" / "models", help="the cache")
    args = parser.parse_args()
    entries, failed = manifest(), False
    for name in args.names or entries:
        if name not in entries:
            parser.error(f"{name}: not in manifest.json")
        try:
            print(f"{name}: {fetch(entries[name], args.out)}")
        except RuntimeError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = True
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
