"""MobileNetV2 of the float recipe, quantised statically (QDQ, uint8 activations, int8 weights per channel)."""

from . import mobilenet_v2 as base
from ._quantized import static

NAME = "mobilenet_v2_int8"
ABOUT = "MobileNetV2, quantised statically (QDQ, u8 activations, s8 weights per channel)"
SHARED = ("_quantized", "_inputs", base.NAME)
INPUT_SETS = base.INPUT_SETS
QUANTIZED = True


def build(directory):
    static(base, directory)
