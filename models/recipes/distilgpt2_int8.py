"""DistilGPT-2 of the float recipe, quantised dynamically (int8 weights, MatMulInteger); the words, which are an
operand of Gather and, turned, of the last product, become bytes behind DequantizeLinear."""

from . import distilgpt2 as base
from ._quantized import dynamic

NAME = "distilgpt2_int8"
ABOUT = "DistilGPT-2 with a cache, quantised dynamically (s8 weights, u8 activations)"
SHARED = ("_quantized", "_inputs", *base.SHARED, base.NAME)
INPUT_SETS = base.INPUT_SETS
QUANTIZED = True


def build(directory):
    dynamic(base, directory)
