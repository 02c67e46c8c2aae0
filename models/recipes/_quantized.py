"""Quantised files as onnxruntime's own quantiser writes them, from the float recipes.

`static`: QuantizeLinear and DequantizeLinear around every operator, activations uint8, weights int8 for each output
channel, ranges from seeded images. `dynamic`: weights int8, activations quantised as they come (MatMulInteger).
"""

import contextlib
import io
import logging
import tempfile
from pathlib import Path

import onnx
import onnx.version_converter

from . import _inputs

# The seeds of goldens are small: calibration sees other images.
CALIBRATION_SEEDS = range(101, 109)


class _Reader:
    """Calibration data as onnxruntime wants to read it."""

    def __init__(self, spec):
        self.feeds = iter([_inputs.make(spec, seed) for seed in CALIBRATION_SEEDS])

    def get_next(self):
        return next(self.feeds, None)


@contextlib.contextmanager
def _float_model(recipe):
    """The float model in a directory of its own, and a silent quantiser, which advises on every call."""
    level = logging.root.level
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        recipe.build(Path(directory))
        logging.disable(logging.WARNING)
        try:
            yield Path(directory) / "model.onnx"
        finally:
            logging.disable(logging.NOTSET)
            logging.root.setLevel(level)


def static(recipe, directory):
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(_Reader, CalibrationDataReader):
        pass

    with _float_model(recipe) as model:
        prepared = model.with_name("prepared.onnx")
        # Scales per channel came with opset 13.
        loaded = onnx.load(str(model))
        if next(o.version for o in loaded.opset_import if not o.domain) < 13:
            onnx.save(onnx.version_converter.convert_version(loaded, 13), str(model))
        # Folds BatchNormalization into convolutions, which the quantiser does not.
        quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(directory / "model.onnx"),
            Reader(recipe.INPUT_SETS[0]),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
        )


def dynamic(recipe, directory):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _float_model(recipe) as model:
        quantize_dynamic(str(model), str(directory / "model.onnx"), weight_type=QuantType.QInt8)
