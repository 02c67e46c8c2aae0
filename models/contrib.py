#!/usr/bin/env python3
"""Writes goldens of onnxruntime's own quantised operators: small seeded models with native onnxruntime's outputs.

    <out>/index.json               [names]
    <out>/<name>/model.onnx        one operator in many forms
    <out>/<name>/data.json         as goldens.py writes it

Integer outputs must be equal in every element. Real outputs are sums of exact integer products, or of float32 ones, so
their tolerance is 1e-5 of a value and of the largest one of its output. Families of ONNX's operators between quantised
tensors, which onnxruntime computes in real numbers here, may differ by a step: a number beside a half falls on either side.

Weights lie within -64..64 where onnxruntime multiplies u8 by s8: without VNNI its kernels add pairs of products in 16
bits, which saturate beyond that, and the golden would depend on the machine.

    python models/contrib.py                # every family
    python models/contrib.py qgemm          # some
"""

import argparse
import hashlib
import json
import sys
import zlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

import tensors  # noqa: E402

MICROSOFT = "com.microsoft"
RTOL = ATOL_SHARE = 1e-5
SETS = 2


class Family:
    """A model under construction, and what makes its feeds."""

    def __init__(self, name, opset=17):
        self.name = name
        self.rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
        self.opset = opset
        self.nodes, self.constants, self.inputs, self.outputs = [], [], [], []
        self.makers = []
        # Of all outputs, where they may differ by one.
        self.step = None

    def constant(self, array, dtype=None):
        """An initializer; `dtype` is that of a TensorProto for types that NumPy lacks."""
        name = f"c{len(self.constants)}"
        if dtype is None:
            tensor = numpy_helper.from_array(np.asarray(array), name)
        else:
            values = np.asarray(array)
            flat = values.astype(np.int64).reshape(-1) & 15
            flat = np.concatenate([flat, np.zeros(len(flat) % 2, np.int64)])
            packed = (flat[0::2] | flat[1::2] << 4).astype(np.uint8)
            tensor = TensorProto(name=name, data_type=dtype, dims=values.shape, raw_data=packed.tobytes())
        self.constants.append(tensor)
        return name

    def input(self, shape, dtype, low=None, high=None):
        """A graph input; integers of `low` to `high`, bools, or normal floats."""
        name = f"x{len(self.inputs)}"
        dtype = np.dtype(dtype)
        if dtype.kind == "f":
            self.makers.append(lambda: self.rng.standard_normal(shape).astype(dtype))
        elif dtype.kind == "b":
            self.makers.append(lambda: self.rng.integers(0, 2, shape).astype(dtype))
        else:
            info = np.iinfo(dtype)
            span = (info.min if low is None else low, (info.max if high is None else high) + 1)
            self.makers.append(lambda: self.rng.integers(*span, shape).astype(dtype))
        self.inputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), shape))
        return name

    def node(self, op, inputs, domain=MICROSOFT, outputs=1, output=True, **attributes):
        names = [f"y{len(self.nodes)}_{i}" for i in range(outputs)]
        inputs = ["" if name is None else name for name in inputs]
        while inputs and not inputs[-1]:
            inputs.pop()
        self.nodes.append(helper.make_node(op, inputs, names, f"{op}_{len(self.nodes)}", domain=domain, **attributes))
        if output:
            self.outputs.extend(names)
        return names[0]

    def scale(self, low=0.01, high=0.05, shape=()):
        return self.constant(self.rng.uniform(low, high, shape).astype(np.float32))

    def zero(self, dtype, shape=(), low=None, high=None):
        info = np.iinfo(dtype)
        span = (info.min // 2 if low is None else low, info.max // 2 if high is None else high)
        return self.constant(self.rng.integers(*span, shape).astype(dtype))

    def real(self, shape, scale=1.0):
        return self.constant((self.rng.standard_normal(shape) * scale).astype(np.float32))

    def integers(self, shape, dtype, low, high):
        return self.constant(self.rng.integers(low, high + 1, shape).astype(dtype))

    def model(self):
        outputs = [onnx.ValueInfoProto(name=name) for name in self.outputs]
        graph = helper.make_graph(self.nodes, self.name, self.inputs, outputs, self.constants)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def qlinear_binary(op):
    f = Family(f"contrib_{op.lower()}")
    for dtype in (np.uint8, np.int8):
        x = f.input([2, 3, 9, 7], dtype)
        for shape in ([2, 3, 9, 7], [3, 1, 1], [9, 1], [7], []):
            y = f.input(shape, dtype)
            f.node(op, [x, f.scale(), f.zero(dtype), y, f.scale(), f.zero(dtype), f.scale(), f.zero(dtype)])
        y = f.input([2, 3, 9, 7], dtype)
        # Sums that are halves, beside an odd zero point.
        halves = [f.constant(np.float32(v)) for v in (0.5, 0.25, 1.0)]
        one = f.constant(dtype(1))
        f.node(op, [x, halves[0], one, y, halves[1], one, halves[2], one])
    return f


def qlinear_unary():
    f = Family("contrib_qlinear_unary")
    for dtype in (np.uint8, np.int8):
        x = f.input([1, 4, 300], dtype)
        for scale in (0.01, 0.05, 0.2):
            given = [x, f.constant(np.float32(scale)), f.zero(dtype)]
            low = f.constant(np.full((), np.iinfo(dtype).min, dtype))
            f.node("QLinearSigmoid", [*given, f.constant(np.float32(1 / 256)), low])
            f.node("QLinearSigmoid", [x, given[1], None, f.scale(), f.zero(dtype)])
            f.node("QLinearLeakyRelu", [*given, f.scale(), f.zero(dtype)])
            f.node("QLinearLeakyRelu", [*given, f.scale(), f.zero(dtype)], alpha=0.3)
    return f


def qlinear_concat():
    f = Family("contrib_qlinearconcat")
    for dtype in (np.uint8, np.int8):
        for axis, shapes in ((1, ([2, 3, 4], [2, 1, 4], [2, 5, 4])), (-1, ([2, 3, 4], [2, 3, 17])), (0, ([3], [2]))):
            result = [f.scale(), f.zero(dtype)]
            parts = []
            for shape in shapes:
                parts += [f.input(shape, dtype), f.scale(), f.zero(dtype)]
            parts[-2:] = result
            f.node("QLinearConcat", [*result, *parts], axis=axis)
    return f


def qlinear_where():
    f = Family("contrib_qlinearwhere")
    for dtype in (np.uint8, np.int8):
        for condition, x, y in (([2, 3, 4], [2, 3, 4], [2, 3, 4]), ([3, 1], [4], [1]), ([4], [], [2, 3, 1])):
            given = [f.input(condition, np.bool_)]
            for shape in (x, y):
                given += [f.input(shape, dtype), f.scale(), f.zero(dtype)]
            f.node("QLinearWhere", [*given, f.scale(), f.zero(dtype)])
        # One scale and zero point for all three.
        same = [f.scale(), f.zero(dtype)]
        parts = [f.input([5], dtype), *same, f.input([5], dtype), *same]
        f.node("QLinearWhere", [f.input([5], np.bool_), *parts, *same])
    return f


def qlinear_average_pool():
    f = Family("contrib_qlinearaveragepool")
    forms = [
        ([2, 3, 11], {"kernel_shape": [3], "strides": [2], "pads": [1, 1]}),
        ([2, 3, 9, 8], {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1]}),
        ([2, 3, 9, 8], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
        ([1, 2, 9, 8], {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
        ([1, 2, 9, 8], {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
        ([1, 2, 5, 6, 4], {"kernel_shape": [2, 3, 2], "strides": [1, 2, 1]}),
    ]
    for dtype in (np.uint8, np.int8):
        for shape, attributes in forms:
            x, same = f.input(shape, dtype), f.scale()
            f.node("QLinearAveragePool", [x, f.scale(), f.zero(dtype), f.scale(), f.zero(dtype)], **attributes)
            # Equal scales: many means are halves.
            f.node("QLinearAveragePool", [x, same, f.zero(dtype), same, f.zero(dtype)], **attributes)
            last = f.input([shape[0], *shape[2:], shape[1]], dtype)
            given = [last, f.scale(), f.zero(dtype), f.scale(), f.zero(dtype)]
            f.node("QLinearAveragePool", given, channels_last=1, **attributes)
    return f


def qlinear_global_average_pool():
    f = Family("contrib_qlinearglobalaveragepool")
    for dtype in (np.uint8, np.int8):
        for shape in ([3, 17, 7, 7], [2, 5, 13], [1, 3, 2, 3, 4], [1, 9, 40, 41]):
            x, same = f.input(shape, dtype), f.scale()
            f.node("QLinearGlobalAveragePool", [x, same, f.zero(dtype), same, f.zero(dtype)])
            given = [x, f.scale(), f.zero(dtype), f.scale(), f.zero(dtype)]
            f.node("QLinearGlobalAveragePool", given, channels_last=1)
    return f


def qlinear_softmax():
    f = Family("contrib_qlinearsoftmax")
    for dtype in (np.uint8, np.int8):
        low = f.constant(np.full((), np.iinfo(dtype).min, dtype))
        for shape in ([4, 30], [2, 3, 40]):
            # Narrow enough for no share to be 1, which onnxruntime cannot write as int8.
            x = f.input(shape, dtype, 0, 60)
            for opset, axis in ((13, -1), (13, 0), (12, 1)):
                given = [x, f.constant(np.float32(0.08)), f.zero(dtype), f.constant(np.float32(1 / 256)), low]
                f.node("QLinearSoftmax", given, opset=opset, axis=axis)
    return f


def qgemm(real):
    f = Family("contrib_qgemm_real" if real else "contrib_qgemm")
    forms = [(np.uint8, np.uint8), (np.uint8, np.int8), (np.int8, np.int8)]
    for a_type, b_type in forms:
        low, high = (0, 64) if b_type is np.uint8 else (-64, 64)
        for m, k, n, per_column, trans_a, trans_b, c_shape in (
            (1, 33, 17, False, 0, 0, None),
            (5, 64, 40, True, 0, 1, [40]),
            (7, 20, 9, True, 1, 0, [1, 9]),
            (4, 16, 8, False, 0, 0, [4, 8]),
            (4, 16, 8, True, 0, 1, [4, 1]),
            (3, 16, 8, False, 0, 0, [1]),
        ):
            a = f.input([k, m] if trans_a else [m, k], a_type)
            b = f.integers([n, k] if trans_b else [k, n], b_type, low, high)
            shape = (n,) if per_column else ()
            zero = f.constant(np.zeros(shape, b_type)) if b_type is np.int8 else f.zero(b_type, shape, 0, 30)
            given = [a, f.scale(), f.zero(a_type), b, f.scale(0.01, 0.02, shape), zero]
            given.append(f.integers(c_shape, np.int32, -3000, 3000) if c_shape else None)
            if not real:
                given += [f.scale(0.2, 0.5), f.zero(a_type)]
            f.node("QGemm", given, transA=trans_a, transB=trans_b, alpha=0.75)
    return f


def quantized_matmul(op):
    f = Family(f"contrib_{op.lower()}")
    dynamic = op == "DynamicQuantizeMatMul"
    for b_type in (np.uint8, np.int8):
        low, high = (0, 64) if b_type is np.uint8 else (-64, 64)
        for a_shape, b_shape, per_column, biased in (
            ([1, 40], [40, 9], False, False),
            ([2, 5, 40], [40, 24], True, True),
            ([2, 3, 16], [2, 16, 8], False, True),
        ):
            b, n = f.integers(b_shape, b_type, low, high), b_shape[-1]
            shape = (n,) if per_column else ()
            scale, zero = f.scale(shape=shape), f.zero(b_type, shape, -3 if b_type is np.int8 else 0, 4)
            bias = f.real([n]) if biased else None
            if dynamic:
                f.node(op, [f.input(a_shape, np.float32), b, scale, zero, bias])
            else:
                a = f.input(a_shape, np.uint8)
                f.node(op, [a, b, f.scale(), scale, f.zero(np.uint8), zero if biased else None, bias])
    return f


def matmul_nbits(bits, blocks):
    f = Family(f"contrib_matmul{bits}bits")
    inputs = {}
    for block in blocks:
        for rows, k, n, zeros, biased in (
            ([1], 128, 40, None, True),
            ([2, 3], 96, 33, "packed", False),
            ([1, 9], 288, 16, "real", True),
        ):
            count = -(-k // block)
            if k not in inputs:
                inputs[k] = f.input([*rows, k], np.float32)
            b = f.integers([n, count, block * bits // 8], np.uint8, 0, 255)
            scales = f.real([n, count], 0.05)
            zero = None
            if zeros == "packed":
                zero = f.integers([n, -(-count * bits // 8)], np.uint8, 0, 255)
            if zeros == "real":
                if bits != 4:
                    # onnxruntime's processor kernels take real zero points of 4 bits only.
                    continue
                zero = f.constant(f.rng.uniform(0, 15, [n, count]).astype(np.float32))
            bias = f.real([n]) if biased else None
            given = [inputs[k], b, scales, zero, None, bias]
            f.node("MatMulNBits", given, K=k, N=n, bits=bits, block_size=block, accuracy_level=1)
    return f


def gather_block_quantized():
    f = Family("contrib_gatherblockquantized")
    indices = f.constant(np.array([[0, 4, -1], [2, 2, 1]], np.int64))
    for bits in (2, 4, 8):
        for zeros in (False, True):
            per, shape = 8 // bits, [5, 3, 96 * bits // 8]
            data = f.integers(shape, np.uint8, 0, 255)
            scales = f.real([5, 3, 3])
            zero = f.integers([5, 3, -(-3 // per)], np.uint8, 0, 255) if zeros else None
            given = [data, indices, scales, zero]
            f.node("GatherBlockQuantized", given, bits=bits, block_size=32, quantize_axis=2)
    for dtype, low, high in ((TensorProto.INT4, -8, 7), (TensorProto.UINT4, 0, 15)):
        for gather, quantize, shape, blocks in ((0, 1, [5, 40, 3], [5, 3, 3]), (1, 0, [32, 5], [2, 5])):
            data = f.constant(f.rng.integers(low, high + 1, shape), dtype)
            zero = f.constant(f.rng.integers(low, high + 1, blocks), dtype)
            for given in ([data, indices, f.real(blocks)], [data, indices, f.real(blocks), zero]):
                f.node("GatherBlockQuantized", given, block_size=16, gather_axis=gather, quantize_axis=quantize)
    # A model needs an input.
    f.node(
        "GatherBlockQuantized",
        [given[0], f.input([4], np.int64, 0, 4), *given[2:]],
        block_size=16,
        gather_axis=1,
        quantize_axis=0,
    )
    return f


def qattention():
    f = Family("contrib_qattention")
    batch, positions, features, hidden, heads = 2, 5, 24, 16, 4

    def mask(shape, low, high):
        return f.integers(shape, np.int32, low, high)

    # A visible first key keeps rows from being hidden as a whole.
    square = f.rng.integers(0, 2, [batch, positions, positions]).astype(np.int32)
    square[:, :, 0] = 1
    for w_type in (np.uint8, np.int8):
        x = f.input([batch, positions, features], np.uint8)
        for per_column, m, past, attributes in (
            (False, None, False, {}),
            (True, None, False, {"unidirectional": 1}),
            (False, mask([batch], 2, 5), False, {}),
            (True, f.constant(np.array([5, 4, 1, 0], np.int32)), False, {}),
            (False, f.constant(square[:, 0]), False, {"mask_filter_value": -5.0}),
            (False, f.constant(square), False, {"unidirectional": 1}),
            (True, None, True, {"unidirectional": 1}),
            (True, f.constant(np.concatenate([square[:, 0]] * 2, 1)[:, : positions + 3]), True, {"scale": 0.3}),
        ):
            low, high = (0, 64) if w_type is np.uint8 else (-64, 64)
            shape = (3 * hidden,) if per_column else ()
            zero = f.constant(np.zeros(shape, w_type)) if w_type is np.int8 else f.zero(w_type, shape, 20, 40)
            w = f.integers([features, 3 * hidden], w_type, low, high)
            given = [x, w, f.real([3 * hidden]), f.constant(np.float32(0.01)), f.scale(0.004, 0.009, shape), m]
            given += [f.zero(np.uint8), zero]
            if past:
                given.append(f.input([2, batch, heads, 3, hidden // heads], np.float32))
            f.node("QAttention", given, outputs=1 + past, num_heads=heads, **attributes)
    return f


def dynamic_quantize_lstm():
    f = Family("contrib_dynamicquantizelstm")
    steps, batch, features, hidden = 4, 2, 6, 5
    for w_type in (np.uint8, np.int8):
        for directions, per_column, full in ((1, False, False), (2, True, True), (1, True, True)):
            low, high = (0, 64) if w_type is np.uint8 else (-64, 64)
            shape = (directions, 4 * hidden) if per_column else (directions,)
            middle = 32 if w_type is np.uint8 else 0
            weights = [f.integers([directions, k, 4 * hidden], w_type, low, high) for k in (features, hidden)]
            given = [f.input([steps, batch, features], np.float32), *weights]
            state = [directions, batch, hidden]
            given += [f.real([directions, 8 * hidden], 0.3) if full else None]
            given += [f.constant(np.array([4, 2], np.int32)) if full else None]
            given += [f.real(state), f.real(state), f.real([directions, 3 * hidden], 0.3)] if full else [None] * 3
            for _ in weights:
                given += [f.scale(0.005, 0.01, shape), f.constant(np.full(shape, middle, w_type))]
            direction = "bidirectional" if directions == 2 else ("reverse" if full else "forward")
            f.node("DynamicQuantizeLSTM", given, outputs=3, hidden_size=hidden, direction=direction)
    return f


def quantize_linear():
    f = Family("contrib_quantizelinear")
    x = f.input([2, 6, 9], np.float32)
    back = []
    for dtype in (np.uint8, np.int8, np.uint16, np.int16):
        for axis, shape in ((None, ()), (1, (6,)), (-1, (9,))):
            attributes = {} if axis is None else {"axis": axis}
            given = [f.scale(0.004, 0.02, shape), f.zero(dtype, shape, 0, 100)]
            q = f.node("QuantizeLinear", [x, *given], **attributes)
            back.append(([q, *given], attributes))
    return f, back


def quantize_linear_integers():
    return quantize_linear()[0]


def dequantize_linear():
    f, back = quantize_linear()
    f.name, f.outputs = "contrib_dequantizelinear", []
    for given, attributes in back:
        f.node("DequantizeLinear", given, **attributes)
    for dtype, low, high in ((TensorProto.INT4, -8, 7), (TensorProto.UINT4, 0, 15)):
        data = f.constant(f.rng.integers(low, high + 1, [5, 7]), dtype)
        zero = f.constant(f.rng.integers(low, high + 1, [5]), dtype)
        f.node("DequantizeLinear", [data, f.scale(shape=(5,)), zero], axis=0)
        one = f.constant(np.array(3), dtype)
        q = f.node("QuantizeLinear", ["x0", f.constant(np.float32(0.2)), one], output=False)
        f.node("DequantizeLinear", [q, f.constant(np.float32(0.2)), one])
    return f


def blocked_weights():
    """ONNX's own blocked form: weights of 4 and 8 bits, made real and multiplied."""
    f = Family("contrib_blocked_weights", opset=21)
    x = f.input([3, 64], np.float32)
    kinds = ((TensorProto.INT4, -8, 7), (TensorProto.UINT4, 0, 15), (None, -128, 127))
    for dtype, low, high in kinds:
        for axis, block, blocks in ((0, 16, [4, 10]), (1, 4, [64, 3]), (0, 24, [3, 10])):
            for zeros in (False, True):

                def weights(shape, dtype=dtype, low=low, high=high):
                    values = f.rng.integers(low, high + 1, shape)
                    return f.constant(values.astype(np.int8)) if dtype is None else f.constant(values, dtype)

                given = [weights([64, 10]), f.scale(0.01, 0.2, blocks), weights(blocks) if zeros else None]
                w = f.node("DequantizeLinear", given, "", axis=axis, block_size=block, output=False)
                f.node("MatMul", [x, w], "")
    return f


def real_of(f, x, scale, zero):
    """The real numbers that a tensor of bytes stands for."""
    return f.node("DequantizeLinear", [x, f.constant(np.float32(scale)), f.constant(np.uint8(zero))], "", output=False)


def in_steps(f, y, zero):
    """Quantises a result and makes it real again, as an output."""
    scheme = [f.constant(np.float32(f.step)), f.constant(np.uint8(zero))]
    f.node("DequantizeLinear", [f.node("QuantizeLinear", [y, *scheme], "", output=False), *scheme], "")


def qdq_conv_transpose():
    f = Family("contrib_qdq_conv_transpose")
    f.step = 0.05
    x = real_of(f, f.input([2, 8, 6, 7], np.uint8), 0.03, 120)
    for kernel, stride, pads, added, groups, columns in (
        ([2, 2], 2, [0, 0, 0, 0], [0, 0], 1, 5),
        ([4, 4], 2, [1, 1, 1, 1], [0, 0], 1, 5),
        ([3, 3], 2, [1, 1, 1, 1], [1, 1], 1, 5),
        ([5, 4], 1, [0, 3, 1, 0], [0, 0], 1, 5),
        ([6, 5], 3, [4, 1, 2, 3], [0, 1], 1, 5),
        ([4, 4], 2, [1, 1, 1, 1], [0, 0], 2, 3),
        ([3, 3], 2, [1, 1, 1, 1], [1, 1], 8, 1),
    ):
        for per_channel in (False, True):
            scales = [columns] if per_channel else []
            given = [f.integers([8, columns, *kernel], np.int8, -127, 127), f.scale(0.003, 0.01, scales)]
            given.append(f.constant(np.zeros(scales, np.int8)))
            w = f.node("DequantizeLinear", given, "", axis=1 if per_channel else 0, output=False)
            attributes = {"strides": [stride, stride], "pads": pads, "output_padding": added, "group": groups}
            y = f.node("ConvTranspose", [x, w, f.real([groups * columns])], "", output=False, **attributes)
            in_steps(f, f.node("Relu", [y], "", output=False) if per_channel else y, 9 if per_channel else 128)
    return f


def qdq_resize():
    f = Family("contrib_qdq_resize")
    f.step = 0.037
    x = real_of(f, f.input([2, 8, 6, 7], np.uint8), 0.03, 120)
    for mode, coordinates, scales in (
        ("linear", "half_pixel", [1, 1, 2, 2]),
        ("linear", "align_corners", [1, 1, 2.5, 3]),
        ("linear", "asymmetric", [1, 1, 0.5, 2]),
        ("cubic", "half_pixel", [1, 1, 2, 2]),
        ("cubic", "pytorch_half_pixel", [1, 1, 0.75, 1.5]),
    ):
        given = [x, None, f.constant(np.array(scales, np.float32))]
        attributes = {"mode": mode, "coordinate_transformation_mode": coordinates}
        in_steps(f, f.node("Resize", given, "", output=False, **attributes), 100)
    return f


def qdq_attention():
    f = Family("contrib_qdq_attention")
    f.step = 1 / 256
    a, b = (real_of(f, f.input([2, 3, 9, 16], np.uint8), 0.004, zero) for zero in (120, 131))
    t = f.node("Transpose", [b], "", perm=[0, 1, 3, 2], output=False)
    in_steps(f, f.node("MatMul", [a, t], "", output=False), 128)
    scores = real_of(f, f.input([2, 3, 9, 40], np.uint8), 0.03, 100)
    for axis in (-1, 1):
        in_steps(f, f.node("Softmax", [scores], "", axis=axis, output=False), 0)
    first = f.node("Split", [a], "", outputs=2, axis=3, output=False)
    second = first.removesuffix("0") + "1"
    in_steps(f, f.node("Sub", [first, second], "", output=False), 128)
    in_steps(f, f.node("Add", [first, second], "", output=False), 128)
    return f


def group_query():
    f = Family("contrib_group_query")
    heads, shared, size = 6, 2, 32
    columns, narrow = heads * size, shared * size
    angles = np.arange(24)[:, None] * 0.7 ** np.arange(size // 2)
    turns = [f.constant(np.cos(angles).astype(np.float32)), f.constant(np.sin(angles).astype(np.float32))]
    half = [f.constant(np.cos(angles[:, ::2]).astype(np.float32)), f.constant(np.sin(angles[:, ::2]).astype(np.float32))]
    sinks = f.real([heads])

    def node(ends, new, past=0, *, packed=False, places=None, bias=None, total=None, sinks=None, turns=(), **attributes):
        batch, total = len(ends), total or max(ends)
        widths = [columns + 2 * narrow] if packed else [columns, narrow, narrow]
        given = [f.input([batch, new, width], np.float32) for width in widths] + [None, None] * packed
        given += [f.input([batch, shared, past, size], np.float32) if past else None for _ in range(2)]
        given += [f.constant(np.array(ends, np.int32) - 1), f.constant(np.array(total, np.int32))]
        given += [*turns] if turns else [None, None]
        given += [f.constant(np.array(places, np.int64)) if places else None]
        given += [f.input([*bias, new, total], np.float32) if bias else None, sinks]
        f.node("GroupQueryAttention", given, outputs=3, num_heads=heads, kv_num_heads=shared, **attributes)

    node([9, 9], 9)
    node([9], 9, packed=True, turns=turns, do_rotary=1)
    node([10, 5], 1, 9, turns=turns, do_rotary=1, rotary_interleaved=1, scale=0.2)
    node([12], 3, 9, packed=True, turns=half, do_rotary=1, softcap=1.5)
    node([11], 11, local_window_size=4, bias=[1, heads])
    node([12, 6], 1, 11, local_window_size=3, bias=[2, 1], softcap=2.0)
    node([6, 6], 6, turns=turns, do_rotary=1, places=[[3, 1, 2, 0, 9, 4], [1, 2, 3, 4, 5, 6]])
    node([12], 3, 9, turns=turns, do_rotary=1, places=[[3, 7, 2]])
    node([10], 1, 9, smooth_softmax=1)
    node([11], 2, 9, sinks=sinks)
    return f


def rotary():
    f = Family("contrib_rotary")
    angles = np.arange(12)[:, None] * 0.6 ** np.arange(4)
    turns = [f.constant(np.cos(angles).astype(np.float32)), f.constant(np.sin(angles).astype(np.float32))]
    flat, heads = f.input([2, 5, 24], np.float32), f.input([2, 3, 5, 8], np.float32)
    wide = f.input([2, 3, 5, 20], np.float32)
    first = f.constant(np.array([4], np.int64))
    places = f.input([2, 5], np.int64, 0, 11)
    for interleaved in (0, 1):
        for ids in (first, places):
            f.node("RotaryEmbedding", [flat, ids, *turns], interleaved=interleaved)
            f.node("RotaryEmbedding", [heads, ids, *turns], interleaved=interleaved)
            f.node(
                "RotaryEmbedding", [wide, ids, *turns], interleaved=interleaved, num_heads=3, rotary_embedding_dim=8
            )
    return f


def embed_norm():
    f = Family("contrib_embed_norm")
    words, places, segments = f.real([30, 16]), f.real([12, 16]), f.real([2, 16])
    norm = [f.real([16]), f.real([16])]
    ids, kinds = f.input([2, 7], np.int32, 0, 29), f.input([2, 7], np.int32, 0, 1)
    mask, own = f.input([2, 7], np.int32, 0, 1), f.input([2, 7], np.int32, 0, 11)
    # Counts of the mask, results 1, are integers, which a family of reals cannot have among its outputs.
    for given, more in (
        ([ids, kinds, words, places, segments, *norm, mask], {"outputs": 3, "epsilon": 1e-12}),
        ([ids, None, words, places, None, *norm, None, own], {"outputs": 2, "epsilon": 1e-5}),
    ):
        y = f.node("EmbedLayerNormalization", given, output=False, **more)
        f.outputs.append(y)
    f.outputs.append("y0_2")
    return f


def fused_products():
    """Convolutions and products with what onnxruntime's optimiser puts into them."""
    f = Family("contrib_fused_products")
    x = f.input([1, 6, 9, 8], np.float32, -2, 2)
    w, b, z = f.real([12, 3, 3, 3]), f.real([12]), f.input([1, 12, 5, 4], np.float32, -2, 2)
    window = {"strides": [2, 2], "pads": [1, 1, 1, 1], "group": 2}
    f.node("FusedConv", [x, w, b], activation="Relu", **window)
    f.node("FusedConv", [x, w, b, z], activation="Relu", **window)
    f.node("FusedConv", [x, w, None, z], **window)
    f.node("FusedConv", [x, w, b], activation="LeakyRelu", activation_params=[0.3], **window)
    f.node("FusedConv", [x, w, b], activation="Clip", activation_params=[-0.5, 0.75], **window)
    f.node("FusedConv", [x, w, b], activation="HardSigmoid", activation_params=[0.3, 0.4], **window)
    a, m, c = f.input([5, 24], np.float32, -2, 2), f.real([24, 18]), f.real([18])
    f.node("FusedGemm", [a, m, c], activation="Relu", alpha=0.5, beta=2.0)
    f.node("FusedGemm", [a, m, c], activation="LeakyRelu", activation_alpha=0.2)
    f.node("FusedGemm", [a, m], activation="Tanh", activation_alpha=0.0)
    return f


FAMILIES = {
    "qlinear_add": lambda: qlinear_binary("QLinearAdd"),
    "qlinear_mul": lambda: qlinear_binary("QLinearMul"),
    "qlinear_unary": qlinear_unary,
    "qlinear_concat": qlinear_concat,
    "qlinear_where": qlinear_where,
    "qlinear_average_pool": qlinear_average_pool,
    "qlinear_global_average_pool": qlinear_global_average_pool,
    "qlinear_softmax": qlinear_softmax,
    "qgemm": lambda: qgemm(False),
    "qgemm_real": lambda: qgemm(True),
    "dynamic_quantize_matmul": lambda: quantized_matmul("DynamicQuantizeMatMul"),
    "matmul_integer_to_float": lambda: quantized_matmul("MatMulIntegerToFloat"),
    "matmul_2bits": lambda: matmul_nbits(2, (16, 64)),
    "matmul_4bits": lambda: matmul_nbits(4, (16, 32, 64, 128, 256)),
    "matmul_8bits": lambda: matmul_nbits(8, (16, 32, 128)),
    "gather_block_quantized": gather_block_quantized,
    "qattention": qattention,
    "dynamic_quantize_lstm": dynamic_quantize_lstm,
    "quantize_linear": quantize_linear_integers,
    "dequantize_linear": dequantize_linear,
    "blocked_weights": blocked_weights,
    "qdq_conv_transpose": qdq_conv_transpose,
    "qdq_resize": qdq_resize,
    "qdq_attention": qdq_attention,
    "group_query": group_query,
    "rotary": rotary,
    "embed_norm": embed_norm,
    "fused_products": fused_products,
}


def golden(f):
    """The bytes of a family's model, and its golden's JSON."""
    model = f.model().SerializeToString()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    # With more, its LSTM quantises the rows of a batch apart, and the result depends on how many there are.
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in f.inputs]
    sets, scale, integers = [], np.inf, set()
    for _ in range(SETS):
        feeds = {name: make() for name, make in zip(names, f.makers, strict=True)}
        results = session.run(f.outputs, feeds)
        for name, array in zip(f.outputs, results, strict=True):
            integers.add(array.dtype.kind != "f")
            if array.dtype.kind == "f":
                if not np.isfinite(array).all():
                    raise RuntimeError(f"{f.name}: output {name} is not finite")
                scale = min(scale, float(np.abs(array).max()))
            elif array.size > 50 and len(np.unique(array)) < 10:
                raise RuntimeError(f"{f.name}: output {name} has few values, and shows little")
        sets.append(
            {
                "inputs": [tensors.encode(feeds[name]) for name in names],
                "outputs": [tensors.encode(array) for array in results],
            }
        )
    if len(integers) != 1:
        raise RuntimeError(f"{f.name}: integers are compared exactly and reals are not; they need a family each")
    exact = integers.pop()
    if f.step is not None:
        # A little more than a step, since both of its ends were rounded.
        rtol, atol = 0.0, 1.01 * f.step
    else:
        rtol, atol = (0.0, 0.0) if exact else (RTOL, ATOL_SHARE * scale)
    return model, {"rtol": rtol, "atol": atol, "inputs": names, "outputs": f.outputs, "sets": sets}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *FAMILIES], metavar="NAME")
    parser.add_argument("--out", type=Path, default=ROOT.parent / "target" / "contrib")
    args = parser.parse_args()
    scripts = b"".join(script.read_bytes() for script in (Path(__file__), ROOT / "tensors.py"))
    wanted = {"scripts": hashlib.sha256(scripts).hexdigest(), "onnxruntime": onnxruntime.__version__}
    stamp, index = args.out / "stamp.json", args.out / "index.json"
    if not args.names and stamp.exists() and json.loads(stamp.read_text()) == wanted:
        print(f"{len(FAMILIES)} families of onnxruntime's operators: up to date")
        return
    stamp.unlink(missing_ok=True)
    names = []
    for name in args.names or FAMILIES:
        f = FAMILIES[name]()
        model, record = golden(f)
        directory = args.out / f.name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "model.onnx").write_bytes(model)
        (directory / "data.json").write_text(json.dumps(record))
        names.append(f.name)
        print(f"{f.name}: {len(f.nodes)} nodes, atol {record['atol']:.3g}", flush=True)
    if not args.names:
        index.write_text(json.dumps(names))
        stamp.write_text(json.dumps(wanted, indent=2) + "\n")


if __name__ == "__main__":
    main()
