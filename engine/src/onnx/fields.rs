//! The one table of field numbers, from `onnx.proto`; reader and writer both use it.
//!
//! A field that is not listed is skipped by its wire type, as protobuf prescribes.

/// What a field holds, and so which wire types it may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A varint, or a packed run of them.
    Int,
    /// Four little-endian bytes, or a packed run of them.
    F32,
    /// Eight little-endian bytes, or a packed run of them.
    F64,
    /// A length and that many bytes.
    Bytes,
    /// A length and a message.
    Message(Msg),
}

macro_rules! messages {
    ($($msg:ident, $module:ident, $text:literal { $($name:ident = $number:literal $kind:expr;)* })*) => {
        /// The messages.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Msg { $($msg,)* }

        impl Msg {
            /// Name in error messages.
            pub(super) fn as_str(self) -> &'static str {
                match self { $(Msg::$msg => $text,)* }
            }

            /// What a field holds; `None` for one that is not read.
            pub(super) fn kind(self, number: u32) -> Option<Kind> {
                use Kind::*;
                match self { $(Msg::$msg => match number { $($number => Some($kind),)* _ => None },)* }
            }

            /// Name of a field in error messages.
            pub(super) fn field(self, number: u32) -> &'static str {
                match self { $(Msg::$msg => match number { $($number => stringify!($name),)* _ => "unknown field" },)* }
            }
        }

        // Some fields are listed only to be refused, so their numbers are not used by name.
        $(#[allow(non_upper_case_globals, dead_code)]
        pub(super) mod $module { $(pub(crate) const $name: u32 = $number;)* })*
    };
}

messages! {
    Model, model, "model" {
        ir_version = 1 Int;
        producer_name = 2 Bytes;
        producer_version = 3 Bytes;
        domain = 4 Bytes;
        model_version = 5 Int;
        graph = 7 Message(Msg::Graph);
        opset_import = 8 Message(Msg::Opset);
        metadata_props = 14 Message(Msg::Entry);
        functions = 25 Message(Msg::Function);
    }
    Opset, opset, "opset_import" {
        domain = 1 Bytes;
        version = 2 Int;
    }
    Entry, entry, "key-value pair" {
        key = 1 Bytes;
        value = 2 Bytes;
    }
    Graph, graph, "graph" {
        node = 1 Message(Msg::Node);
        name = 2 Bytes;
        initializer = 5 Message(Msg::Tensor);
        input = 11 Message(Msg::ValueInfo);
        output = 12 Message(Msg::ValueInfo);
        value_info = 13 Message(Msg::ValueInfo);
        sparse_initializer = 15 Message(Msg::Sparse);
    }
    Function, function, "function" {
        name = 1 Bytes;
        input = 4 Bytes;
        output = 5 Bytes;
        attribute = 6 Bytes;
        node = 7 Message(Msg::Node);
        opset_import = 9 Message(Msg::Opset);
        domain = 10 Bytes;
        attribute_proto = 11 Message(Msg::Attribute);
        value_info = 12 Message(Msg::ValueInfo);
        overload = 13 Bytes;
    }
    Node, node, "node" {
        input = 1 Bytes;
        output = 2 Bytes;
        name = 3 Bytes;
        op_type = 4 Bytes;
        attribute = 5 Message(Msg::Attribute);
        domain = 7 Bytes;
        overload = 8 Bytes;
    }
    Attribute, attribute, "attribute" {
        name = 1 Bytes;
        f = 2 F32;
        i = 3 Int;
        s = 4 Bytes;
        t = 5 Message(Msg::Tensor);
        g = 6 Message(Msg::Graph);
        floats = 7 F32;
        ints = 8 Int;
        strings = 9 Bytes;
        tensors = 10 Message(Msg::Tensor);
        graphs = 11 Message(Msg::Graph);
        tp = 14 Message(Msg::Type);
        type_protos = 15 Message(Msg::Type);
        attribute_type = 20 Int;
        ref_attr_name = 21 Bytes;
        sparse_tensor = 22 Message(Msg::Sparse);
        sparse_tensors = 23 Message(Msg::Sparse);
    }
    Tensor, tensor, "tensor" {
        dims = 1 Int;
        data_type = 2 Int;
        segment = 3 Message(Msg::Segment);
        float_data = 4 F32;
        int32_data = 5 Int;
        string_data = 6 Bytes;
        int64_data = 7 Int;
        name = 8 Bytes;
        raw_data = 9 Bytes;
        double_data = 10 F64;
        uint64_data = 11 Int;
        external_data = 13 Message(Msg::Entry);
        data_location = 14 Int;
    }
    Segment, segment, "segment" {}
    Sparse, sparse, "sparse tensor" {
        values = 1 Message(Msg::Tensor);
        indices = 2 Message(Msg::Tensor);
        dims = 3 Int;
    }
    ValueInfo, value_info, "value info" {
        name = 1 Bytes;
        value_type = 2 Message(Msg::Type);
    }
    Type, type_proto, "type" {
        tensor_type = 1 Message(Msg::TensorType);
        sequence_type = 4 Message(Msg::Wrapper);
        map_type = 5 Message(Msg::Map);
        opaque_type = 7 Message(Msg::Opaque);
        sparse_tensor_type = 8 Message(Msg::TensorType);
        optional_type = 9 Message(Msg::Wrapper);
    }
    TensorType, tensor_type, "tensor type" {
        elem_type = 1 Int;
        shape = 2 Message(Msg::Shape);
    }
    // `TypeProto.Sequence` and `TypeProto.Optional` have the same fields.
    Wrapper, wrapper, "element type" {
        elem_type = 1 Message(Msg::Type);
    }
    Map, map, "map type" {
        key_type = 1 Int;
        value_type = 2 Message(Msg::Type);
    }
    Opaque, opaque, "opaque type" {
        domain = 1 Bytes;
        name = 2 Bytes;
    }
    Shape, shape, "shape" {
        dim = 1 Message(Msg::Dim);
    }
    Dim, dim, "dimension" {
        dim_value = 1 Int;
        dim_param = 2 Bytes;
    }
}
