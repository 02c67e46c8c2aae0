//! From [`Model`] back to bytes.
//!
//! Protobuf puts the length of a message before it. A first pass with the same code counts, so that everything is
//! written once, to its final place. Elements are written as `raw_data`, lists packed.

use super::fields::{
    attribute, dim, entry, function, graph, map, model, node, opaque, opset, shape, sparse, tensor, tensor_type,
    type_proto, value_info, wrapper,
};
use super::schema::{
    Attribute, AttributeValue, Dim, Function, Graph, Model, Node, OpsetId, SparseTensor, TensorData, TensorProto,
    TypeProto, ValueInfo,
};

impl Model {
    /// The model as the bytes of an `.onnx` file; reading them gives an equal model.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut count = Writer { out: None, len: 0 };
        self.write(&mut count);
        let mut out = Vec::with_capacity(count.len);
        self.write(&mut Writer { out: Some(&mut out), len: 0 });
        out
    }

    /// How long [`to_bytes`](Self::to_bytes) would be, with what is still in other files.
    pub fn byte_len(&self) -> usize {
        let mut count = Writer { out: None, len: 0 };
        self.write(&mut count);
        let external: u64 = self.external().map(|e| e.length).sum();
        count.len.saturating_add(usize::try_from(external).unwrap_or(usize::MAX))
    }
}

/// Writes, or only counts when there is nothing to write to.
struct Writer<'a> {
    out: Option<&'a mut Vec<u8>>,
    len: usize,
}

impl Writer<'_> {
    fn raw(&mut self, bytes: &[u8]) {
        self.len += bytes.len();
        if let Some(out) = &mut self.out {
            out.extend_from_slice(bytes);
        }
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.raw(&[value as u8 | 0x80]);
            value >>= 7;
        }
        self.raw(&[value as u8]);
    }

    fn key(&mut self, number: u32, wire_type: u64) {
        self.varint(u64::from(number) << 3 | wire_type);
    }

    fn int(&mut self, number: u32, value: i64) {
        self.key(number, 0);
        self.varint(value as u64);
    }

    fn bytes(&mut self, number: u32, bytes: &[u8]) {
        self.key(number, 2);
        self.varint(bytes.len() as u64);
        self.raw(bytes);
    }

    /// Text of a field that is left out when empty.
    fn text(&mut self, number: u32, text: &str) {
        if !text.is_empty() {
            self.bytes(number, text.as_bytes());
        }
    }

    fn texts(&mut self, number: u32, texts: &[String]) {
        texts.iter().for_each(|t| self.bytes(number, t.as_bytes()));
    }

    fn nested(&mut self, number: u32, write: impl Fn(&mut Writer<'_>)) {
        let mut count = Writer { out: None, len: 0 };
        write(&mut count);
        self.key(number, 2);
        self.varint(count.len as u64);
        if self.out.is_some() {
            write(self);
        } else {
            self.len += count.len;
        }
    }

    fn ints(&mut self, number: u32, values: impl ExactSizeIterator<Item = i64> + Clone) {
        if values.len() > 0 {
            self.nested(number, |w| values.clone().for_each(|v| w.varint(v as u64)));
        }
    }

    fn message(&mut self, number: u32, message: &dyn Write) {
        // Through the trait object, so that bodies inside bodies do not nest closure types.
        self.nested(number, |w| message.write(w));
    }

    fn messages<T: Write>(&mut self, number: u32, messages: &[T]) {
        messages.iter().for_each(|m| self.message(number, m));
    }

    fn entry(&mut self, number: u32, key: &str, value: &str) {
        self.nested(number, |w| {
            w.bytes(entry::key, key.as_bytes());
            w.bytes(entry::value, value.as_bytes());
        });
    }
}

trait Write {
    fn write(&self, w: &mut Writer<'_>);
}

impl Write for Model {
    fn write(&self, w: &mut Writer<'_>) {
        w.int(model::ir_version, self.ir_version);
        w.text(model::producer_name, &self.producer_name);
        w.text(model::producer_version, &self.producer_version);
        w.text(model::domain, &self.domain);
        w.int(model::model_version, self.model_version);
        w.message(model::graph, &self.graph);
        w.messages(model::opset_import, &self.opset_imports);
        self.metadata_props.iter().for_each(|(k, v)| w.entry(model::metadata_props, k, v));
        w.messages(model::functions, &self.functions);
    }
}

impl Write for OpsetId {
    fn write(&self, w: &mut Writer<'_>) {
        w.bytes(opset::domain, self.domain.as_bytes());
        w.int(opset::version, self.version);
    }
}

impl Write for Graph {
    fn write(&self, w: &mut Writer<'_>) {
        w.messages(graph::node, &self.nodes);
        w.text(graph::name, &self.name);
        w.messages(graph::initializer, &self.initializers);
        w.messages(graph::input, &self.inputs);
        w.messages(graph::output, &self.outputs);
        w.messages(graph::value_info, &self.value_info);
        w.messages(graph::sparse_initializer, &self.sparse_initializers);
    }
}

impl Write for Function {
    fn write(&self, w: &mut Writer<'_>) {
        w.text(function::name, &self.name);
        w.texts(function::input, &self.inputs);
        w.texts(function::output, &self.outputs);
        w.texts(function::attribute, &self.attributes);
        w.messages(function::node, &self.nodes);
        w.messages(function::opset_import, &self.opset_imports);
        w.text(function::domain, &self.domain);
        w.messages(function::attribute_proto, &self.attribute_defaults);
        w.messages(function::value_info, &self.value_info);
        w.text(function::overload, &self.overload);
    }
}

impl Write for Node {
    fn write(&self, w: &mut Writer<'_>) {
        w.texts(node::input, &self.inputs);
        w.texts(node::output, &self.outputs);
        w.text(node::name, &self.name);
        w.text(node::op_type, &self.op_type);
        w.messages(node::attribute, &self.attributes);
        w.text(node::domain, &self.domain);
        w.text(node::overload, &self.overload);
    }
}

impl Write for Attribute {
    fn write(&self, w: &mut Writer<'_>) {
        w.text(attribute::name, &self.name);
        match &self.value {
            AttributeValue::Float(f) => {
                w.key(attribute::f, 5);
                w.raw(&f.to_le_bytes());
            }
            AttributeValue::Int(i) => w.int(attribute::i, *i),
            AttributeValue::String(s) => w.bytes(attribute::s, s),
            AttributeValue::Tensor(t) => w.message(attribute::t, t),
            AttributeValue::Graph(g) => w.message(attribute::g, &**g),
            AttributeValue::SparseTensor(s) => w.message(attribute::sparse_tensor, &**s),
            AttributeValue::Type(t) => w.message(attribute::tp, t),
            AttributeValue::Floats(v) => {
                w.nested(attribute::floats, |w| v.iter().for_each(|f| w.raw(&f.to_le_bytes())));
            }
            AttributeValue::Ints(v) => w.ints(attribute::ints, v.iter().copied()),
            AttributeValue::Strings(v) => v.iter().for_each(|s| w.bytes(attribute::strings, s)),
            AttributeValue::Tensors(v) => w.messages(attribute::tensors, v),
            AttributeValue::Graphs(v) => w.messages(attribute::graphs, v),
            AttributeValue::SparseTensors(v) => w.messages(attribute::sparse_tensors, v),
            AttributeValue::Types(v) => w.messages(attribute::type_protos, v),
            AttributeValue::Ref { ref_attr_name, .. } => w.text(attribute::ref_attr_name, ref_attr_name),
        }
        w.int(attribute::attribute_type, i64::from(self.value.type_code()));
    }
}

impl Write for ValueInfo {
    fn write(&self, w: &mut Writer<'_>) {
        w.text(value_info::name, &self.name);
        if let Some(t) = &self.ty {
            w.message(value_info::value_type, t);
        }
    }
}

impl Write for TypeProto {
    fn write(&self, w: &mut Writer<'_>) {
        let tensor = |w: &mut Writer<'_>, elem_type: i32, dims: &Option<Vec<Dim>>| {
            w.int(tensor_type::elem_type, i64::from(elem_type));
            if let Some(dims) = dims {
                w.nested(tensor_type::shape, |w| w.messages(shape::dim, dims));
            }
        };
        match self {
            TypeProto::Tensor { elem_type, shape } => {
                w.nested(type_proto::tensor_type, |w| tensor(w, *elem_type, shape));
            }
            TypeProto::SparseTensor { elem_type, shape } => {
                w.nested(type_proto::sparse_tensor_type, |w| tensor(w, *elem_type, shape));
            }
            TypeProto::Sequence(t) => w.nested(type_proto::sequence_type, |w| w.message(wrapper::elem_type, &**t)),
            TypeProto::Optional(t) => w.nested(type_proto::optional_type, |w| w.message(wrapper::elem_type, &**t)),
            TypeProto::Map { key_type, value_type } => w.nested(type_proto::map_type, |w| {
                w.int(map::key_type, i64::from(*key_type));
                w.message(map::value_type, &**value_type);
            }),
            TypeProto::Opaque { domain, name } => w.nested(type_proto::opaque_type, |w| {
                w.text(opaque::domain, domain);
                w.text(opaque::name, name);
            }),
        }
    }
}

impl Write for Dim {
    fn write(&self, w: &mut Writer<'_>) {
        match self {
            Dim::Known(n) => w.int(dim::dim_value, *n),
            Dim::Param(s) => w.text(dim::dim_param, s),
            Dim::Unknown => {}
        }
    }
}

impl Write for TensorProto {
    fn write(&self, w: &mut Writer<'_>) {
        w.ints(tensor::dims, self.dims.iter().map(|&d| d as i64));
        w.int(tensor::data_type, self.dtype as i64);
        w.text(tensor::name, &self.name);
        match &self.data {
            TensorData::Bytes(bytes) => w.bytes(tensor::raw_data, bytes.as_ref()),
            TensorData::Strings(strings) => w.texts(tensor::string_data, strings),
            TensorData::External(e) => {
                w.entry(tensor::external_data, "location", &e.location);
                w.entry(tensor::external_data, "offset", &e.offset.to_string());
                w.entry(tensor::external_data, "length", &e.length.to_string());
                if let Some(checksum) = &e.checksum {
                    w.entry(tensor::external_data, "checksum", checksum);
                }
                w.int(tensor::data_location, 1);
            }
        }
    }
}

impl Write for SparseTensor {
    fn write(&self, w: &mut Writer<'_>) {
        w.message(sparse::values, &self.values);
        w.message(sparse::indices, &self.indices);
        w.ints(sparse::dims, self.dims.iter().map(|&d| d as i64));
    }
}
