"""MiniLM-L6 of the float recipe, quantised dynamically (int8 weights, MatMulInteger)."""

from . import minilm_l6 as base
from ._quantized import dynamic

NAME = "minilm_l6_int8"
ABOUT = "MiniLM-L6, quantised dynamically (s8 weights, u8 activations)"
SHARED = ("_quantized", "_inputs", *base.SHARED, base.NAME)
INPUT_SETS = base.INPUT_SETS
QUANTIZED = True


def build(directory):
    dynamic(base, directory)
