"""DistilBERT of the float recipe, quantised dynamically (int8 weights, MatMulInteger)."""

from . import distilbert_base as base
from ._quantized import dynamic

NAME = "distilbert_base_int8"
ABOUT = "DistilBERT, quantised dynamically (s8 weights, u8 activations)"
SHARED = ("_quantized", "_inputs", *base.SHARED, base.NAME)
INPUT_SETS = base.INPUT_SETS
QUANTIZED = True


def build(directory):
    dynamic(base, directory)
