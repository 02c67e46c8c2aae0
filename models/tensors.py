"""The JSON form of tensors that goldens and conformance cases share.

    {"dtype": "float", "dims": [1, 3], "b64": "..."}        little-endian raw bytes
    {"dtype": "string", "dims": [2], "strings": ["a", "b"]}

`dtype` is the ONNX name in lower case (float, float16, bfloat16, double, int64, bool, uint4,
float8e4m3fn...). Types under a byte are packed as ONNX packs them: the first element in the low bits.
"""

import base64

import numpy as np
from onnx import TensorProto, numpy_helper


def dtype_name(data_type):
    """The JSON name of a TensorProto data type."""
    return TensorProto.DataType.Name(data_type).lower()


def encode(value):
    """The JSON form of an array, a NumPy scalar or a TensorProto."""
    if not isinstance(value, TensorProto):
        value = numpy_helper.from_array(np.asarray(value))
    elif not value.HasField("raw_data"):
        # Typed fields such as int32_data become raw bytes by way of an array.
        value = numpy_helper.from_array(numpy_helper.to_array(value))
    entry = {"dtype": dtype_name(value.data_type), "dims": list(value.dims)}
    if value.data_type == TensorProto.STRING:
        entry["strings"] = [text.decode() for text in value.string_data]
    else:
        entry["b64"] = base64.b64encode(value.raw_data).decode()
    return entry


def decode(entry):
    """The array of a JSON tensor."""
    tensor = TensorProto(data_type=TensorProto.DataType.Value(entry["dtype"].upper()), dims=entry["dims"])
    if "strings" in entry:
        tensor.string_data.extend(text.encode() for text in entry["strings"])
    else:
        tensor.raw_data = base64.b64decode(entry["b64"])
    return numpy_helper.to_array(tensor)
