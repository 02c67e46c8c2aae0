"""A small writer of ONNX graphs, and the seeded weights that the recipes share."""

import hashlib
import math

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# The IR version that belongs to each opset in use, so that older runtimes load the files.
IR_VERSION = {11: 6, 13: 7, 14: 7, 17: 8}


class Graph:
    """Collects nodes and initializers in the order an exporter would write them."""

    def __init__(self, name, opset, producer, producer_version):
        self.name = name
        self.opset = opset
        self.producer = (producer, producer_version)
        self.nodes, self.initializers, self.inputs, self.outputs = [], [], [], []
        self._taken = set()

    def unique(self, name):
        """`name`, or `name_1`, `name_2`... when it is taken, as torch.onnx numbers repeated calls."""
        candidate, n = name, 0
        while candidate in self._taken:
            n += 1
            candidate = f"{name}_{n}"
        self._taken.add(candidate)
        return candidate

    def node(self, op, inputs, scope="", outputs=None, **attributes):
        """Adds one node named `<scope>/<op>` and returns its first output."""
        name = self.unique(f"{scope}/{op}")
        outputs = outputs or [f"{name}_output_0"]
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, **attributes))
        return outputs[0]

    def constant(self, value, scope="", dtype=None):
        """A `Constant` node: torch.onnx writes scalars and shapes this way, not as initializers."""
        tensor = numpy_helper.from_array(np.asarray(value, dtype=dtype))
        return self.node("Constant", [], scope, value=tensor)

    def init(self, name, array):
        """Adds an initializer and returns its name."""
        # Not ascontiguousarray, which turns a scalar into a vector of one.
        array = np.asarray(array, order="C")
        self._taken.add(name)
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def input(self, name, dtype, dims):
        self.inputs.append(helper.make_tensor_value_info(name, dtype, dims))
        return name

    def output(self, name, dtype, dims):
        self.outputs.append(helper.make_tensor_value_info(name, dtype, dims))

    def save(self, path):
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, self.initializers)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", self.opset)],
            producer_name=self.producer[0],
            producer_version=self.producer[1],
            ir_version=IR_VERSION[self.opset],
        )
        onnx.save_model(model, str(path))


class Weights:
    """Seeded weights: every tensor has its own generator, keyed by model and tensor name, so that
    adding or reordering layers changes no other tensor."""

    def __init__(self, model):
        self.model = model

    def _rng(self, name):
        digest = hashlib.sha256(f"{self.model}/{name}".encode()).digest()
        return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))

    def normal(self, name, shape, std, mean=0.0):
        x = self._rng(name).standard_normal(shape, dtype=np.float32)
        return x * np.float32(std) + np.float32(mean)

    def uniform(self, name, shape, low, high):
        x = self._rng(name).random(shape, dtype=np.float32)
        return x * np.float32(high - low) + np.float32(low)

    def he(self, name, shape, fan_in, gain=2.0):
        """He et al. 2015: variance gain / fan_in; gain 2 keeps the second moment through a ReLU."""
        return self.normal(name, shape, math.sqrt(gain / fan_in))

    def he_centred(self, name, shape, fan_in, gain=2.0):
        """`he` for filters [out, ...fan_in] with each filter's mean taken away. Without it the positive
        mean behind every ReLU swamps the image within a few layers, and outputs barely depend on it."""
        weight = self.he(name, shape, fan_in, gain)
        return weight - weight.mean(axis=tuple(range(1, weight.ndim)), keepdims=True)


FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
