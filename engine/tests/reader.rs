//! The ONNX reader and writer: hand-assembled files, every chunking, every cut, wrong bytes, real models.

use weblane_engine::error::{Error, ErrorCode};
use weblane_engine::onnx::{
    Attribute, AttributeValue, Dim, ExternalData, Function, Graph, Limits, Model, Node, OpsetId, Reader, SparseTensor,
    TensorData, TensorProto, TypeProto, ValueInfo,
};
use weblane_engine::storage::AlignedBytes;
use weblane_engine::tensor::DType;

// A protobuf writer that knows nothing of ONNX, so that a wrong field number in the engine's table shows.

fn varint(mut v: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while v >= 0x80 {
        out.push(v as u8 | 0x80);
        v >>= 7;
    }
    out.push(v as u8);
    out
}

fn int(number: u64, v: i64) -> Vec<u8> {
    [varint(number << 3), varint(v as u64)].concat()
}

fn len(number: u64, bytes: impl AsRef<[u8]>) -> Vec<u8> {
    let bytes = bytes.as_ref();
    [varint(number << 3 | 2), varint(bytes.len() as u64), bytes.to_vec()].concat()
}

fn msg(number: u64, fields: &[Vec<u8>]) -> Vec<u8> {
    len(number, fields.concat())
}

fn f32_field(number: u64, v: f32) -> Vec<u8> {
    [varint(number << 3 | 5), v.to_le_bytes().to_vec()].concat()
}

fn f64_field(number: u64, v: f64) -> Vec<u8> {
    [varint(number << 3 | 1), v.to_le_bytes().to_vec()].concat()
}

fn packed(number: u64, values: &[i64]) -> Vec<u8> {
    len(number, values.iter().flat_map(|&v| varint(v as u64)).collect::<Vec<_>>())
}

fn unpacked(number: u64, values: &[i64]) -> Vec<u8> {
    values.iter().flat_map(|&v| int(number, v)).collect()
}

fn le<const N: usize, T>(values: &[T], f: impl Fn(&T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(f).collect()
}

/// A model around the fields of a graph.
fn model_of(graph: &[Vec<u8>]) -> Vec<u8> {
    [int(1, 8), msg(7, graph), msg(8, &[len(1, ""), int(2, 17)])].concat()
}

/// A model with one initializer of these fields.
fn tensor_model(fields: &[Vec<u8>]) -> Vec<u8> {
    model_of(&[msg(5, &[vec![len(8, "w")], fields.to_vec()].concat())])
}

fn read_tensor(fields: &[Vec<u8>]) -> Result<TensorProto, Error> {
    Model::parse(&tensor_model(fields)).map(|m| m.graph.initializers.into_iter().next().unwrap())
}

fn read_attribute(fields: &[Vec<u8>]) -> Result<AttributeValue, Error> {
    let attribute = [vec![len(1, "a")], fields.to_vec()].concat();
    let model = Model::parse(&model_of(&[msg(1, &[len(4, "Op"), msg(5, &attribute)])]))?;
    Ok(model.graph.nodes[0].attributes[0].value.clone())
}

fn bytes_of(b: &[u8]) -> TensorData {
    TensorData::Bytes(AlignedBytes::copy_of(b).unwrap())
}

fn f32s(name: &str, dims: &[usize], values: &[f32]) -> TensorProto {
    TensorProto {
        name: name.into(),
        dtype: DType::F32,
        dims: dims.into(),
        data: bytes_of(&le(values, |v| v.to_le_bytes())),
    }
}

fn code(bytes: &[u8]) -> ErrorCode {
    Model::parse(bytes).unwrap_err().code
}

/// Pieces of pseudo-random sizes (xorshift), up to `max` bytes.
fn read_in_pieces(bytes: &[u8], seed: u64, max: usize) -> Result<Model, Error> {
    let mut reader = Reader::default();
    let (mut state, mut rest) = (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, bytes);
    while !rest.is_empty() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let (now, later) = rest.split_at((state as usize % (max + 1)).min(rest.len()));
        reader.push(now)?;
        rest = later;
    }
    reader.finish()
}

/// A model with every field that the reader knows, in wire form and as what it must become.
fn everything() -> (Vec<u8>, Model) {
    let opset = |number: u64, domain: &str, version: i64| msg(number, &[len(1, domain), int(2, version)]);
    let dims =
        |number: u64| msg(number, &[msg(1, &[int(1, 3)]), msg(1, &[len(2, "N"), len(3, "denotation")]), msg(1, &[])]);
    let tensor_type = |number: u64| msg(number, &[int(1, 1), dims(2)]);
    let small = |number: u64| msg(number, &[int(1, 1), int(2, 1), f32_field(4, 2.5)]);
    let sparse = |number: u64| {
        let indices = [int(1, 1), int(2, 7), len(9, 2i64.to_le_bytes())];
        msg(number, &[msg(1, &[int(1, 1), int(2, 1), len(8, "s"), f32_field(4, 4.0)]), msg(2, &indices), int(3, 5)])
    };
    let body = |number: u64, name: &str| msg(number, &[len(2, name)]);
    let attributes = [
        msg(5, &[len(1, "float"), f32_field(2, 0.5), int(20, 1)]),
        msg(5, &[len(1, "int"), int(3, -3), int(20, 2)]),
        msg(5, &[len(1, "string"), len(4, b"\xff\xfe"), int(20, 3)]),
        msg(5, &[len(1, "tensor"), small(5), int(20, 4)]),
        msg(5, &[len(1, "graph"), body(6, "then"), int(20, 5)]),
        msg(5, &[len(1, "floats"), f32_field(7, 1.0), len(7, le(&[2f32, 3.0], |v| v.to_le_bytes())), int(20, 6)]),
        msg(5, &[len(1, "ints"), unpacked(8, &[1, -2]), packed(8, &[3, i64::MIN]), int(20, 7)]),
        msg(5, &[len(1, "strings"), len(9, "x"), len(9, ""), int(20, 8)]),
        msg(5, &[len(1, "tensors"), small(10), small(10), int(20, 9)]),
        msg(5, &[len(1, "graphs"), body(11, "a"), body(11, "b"), int(20, 10)]),
        msg(5, &[len(1, "sparse"), sparse(22), int(20, 11)]),
        msg(5, &[len(1, "sparses"), sparse(23), int(20, 12)]),
        msg(5, &[len(1, "type"), msg(14, &[tensor_type(1)]), int(20, 13)]),
        msg(5, &[len(1, "types"), msg(15, &[msg(4, &[msg(1, &[tensor_type(1)])])]), int(20, 14)]),
        msg(5, &[len(1, "ref"), len(13, "documentation"), int(20, 2), len(21, "outer")]),
    ];
    let node = [
        vec![len(1, "x"), len(1, ""), len(2, "y"), len(3, "n"), len(4, "Op"), len(6, "documentation")],
        attributes.to_vec(),
        vec![len(7, "my.domain"), len(8, "v2"), msg(9, &[len(1, "k"), len(2, "v")])],
    ]
    .concat();
    let info =
        |number: u64, name: &str, ty: Vec<u8>| msg(number, &[len(1, name), msg(2, &[ty]), len(3, "documentation")]);
    let graph = [
        msg(1, &node),
        len(2, "g"),
        msg(5, &[packed(1, &[2, 1]), int(2, 1), len(8, "w"), len(9, le(&[1f32, -1.0], |v| v.to_le_bytes()))]),
        len(10, "documentation"),
        info(11, "x", tensor_type(1)),
        info(11, "seq", msg(4, &[msg(1, &[tensor_type(1)])])),
        info(12, "opt", msg(9, &[msg(1, &[msg(1, &[int(1, 7)])])])),
        info(12, "map", msg(5, &[int(1, 8), msg(2, &[msg(1, &[int(1, 1)])])])),
        info(13, "sparse", tensor_type(8)),
        info(13, "opaque", msg(7, &[len(1, "d"), len(2, "t")])),
        msg(13, &[len(1, "untyped")]),
        msg(14, &[len(1, "quantization_annotation")]),
        sparse(15),
    ];
    let function = [
        len(1, "Twice"),
        len(4, "a"),
        len(5, "b"),
        len(6, "alpha"),
        msg(7, &[len(4, "Add")]),
        len(8, "documentation"),
        opset(9, "", 17),
        len(10, "my.domain"),
        msg(11, &[len(1, "beta"), int(3, 1), int(20, 2)]),
        info(12, "a", msg(1, &[int(1, 1)])),
        len(13, "v2"),
    ];
    let bytes = [
        int(1, 8),
        len(2, "producer"),
        len(3, "1.0"),
        len(4, "com.example"),
        int(5, 7),
        len(6, "documentation"),
        msg(7, &graph),
        opset(8, "", 17),
        opset(8, "my.domain", 1),
        msg(14, &[len(1, "key"), len(2, "value")]),
        msg(25, &function),
    ]
    .concat();

    let shape = Some(vec![Dim::Known(3), Dim::Param("N".into()), Dim::Unknown]);
    let tensor_type = || TypeProto::Tensor { elem_type: 1, shape: shape.clone() };
    let unknown_shape = |elem_type| Box::new(TypeProto::Tensor { elem_type, shape: None });
    let info = |name: &str, ty| ValueInfo { name: name.into(), ty: Some(ty) };
    let small = || f32s("", &[1], &[2.5]);
    let sparse = || SparseTensor {
        values: f32s("s", &[1], &[4.0]),
        indices: TensorProto {
            name: String::new(),
            dtype: DType::I64,
            dims: vec![1],
            data: bytes_of(&2i64.to_le_bytes()),
        },
        dims: vec![5],
    };
    let body = |name: &str| Graph { name: name.into(), ..Graph::default() };
    let attributes = [
        ("float", AttributeValue::Float(0.5)),
        ("int", AttributeValue::Int(-3)),
        ("string", AttributeValue::String(vec![0xff, 0xfe])),
        ("tensor", AttributeValue::Tensor(small())),
        ("graph", AttributeValue::Graph(Box::new(body("then")))),
        ("floats", AttributeValue::Floats(vec![1.0, 2.0, 3.0])),
        ("ints", AttributeValue::Ints(vec![1, -2, 3, i64::MIN])),
        ("strings", AttributeValue::Strings(vec![b"x".to_vec(), vec![]])),
        ("tensors", AttributeValue::Tensors(vec![small(), small()])),
        ("graphs", AttributeValue::Graphs(vec![body("a"), body("b")])),
        ("sparse", AttributeValue::SparseTensor(Box::new(sparse()))),
        ("sparses", AttributeValue::SparseTensors(vec![sparse()])),
        ("type", AttributeValue::Type(tensor_type())),
        ("types", AttributeValue::Types(vec![TypeProto::Sequence(Box::new(tensor_type()))])),
        ("ref", AttributeValue::Ref { ref_attr_name: "outer".into(), attribute_type: 2 }),
    ];
    let model = Model {
        ir_version: 8,
        producer_name: "producer".into(),
        producer_version: "1.0".into(),
        domain: "com.example".into(),
        model_version: 7,
        opset_imports: vec![
            OpsetId { domain: String::new(), version: 17 },
            OpsetId { domain: "my.domain".into(), version: 1 },
        ],
        metadata_props: vec![("key".into(), "value".into())],
        graph: Graph {
            name: "g".into(),
            nodes: vec![Node {
                name: "n".into(),
                op_type: "Op".into(),
                domain: "my.domain".into(),
                overload: "v2".into(),
                inputs: vec!["x".into(), String::new()],
                outputs: vec!["y".into()],
                attributes: attributes.map(|(name, value)| Attribute { name: name.into(), value }).to_vec(),
            }],
            initializers: vec![f32s("w", &[2, 1], &[1.0, -1.0])],
            sparse_initializers: vec![sparse()],
            inputs: vec![info("x", tensor_type()), info("seq", TypeProto::Sequence(Box::new(tensor_type())))],
            outputs: vec![
                info("opt", TypeProto::Optional(unknown_shape(7))),
                info("map", TypeProto::Map { key_type: 8, value_type: unknown_shape(1) }),
            ],
            value_info: vec![
                info("sparse", TypeProto::SparseTensor { elem_type: 1, shape: shape.clone() }),
                info("opaque", TypeProto::Opaque { domain: "d".into(), name: "t".into() }),
                ValueInfo { name: "untyped".into(), ty: None },
            ],
        },
        functions: vec![Function {
            name: "Twice".into(),
            domain: "my.domain".into(),
            overload: "v2".into(),
            inputs: vec!["a".into()],
            outputs: vec!["b".into()],
            attributes: vec!["alpha".into()],
            attribute_defaults: vec![Attribute { name: "beta".into(), value: AttributeValue::Int(1) }],
            nodes: vec![Node { op_type: "Add".into(), ..Node::default() }],
            opset_imports: vec![OpsetId { domain: String::new(), version: 17 }],
            value_info: vec![info("a", *unknown_shape(1))],
        }],
    };
    (bytes, model)
}

#[test]
fn every_field_is_read() {
    let (bytes, want) = everything();
    assert_eq!(Model::parse(&bytes).unwrap(), want);
}

#[test]
fn written_models_read_equal() {
    let (_, want) = everything();
    let bytes = want.to_bytes();
    assert_eq!(Model::parse(&bytes).unwrap(), want);
}

#[test]
fn the_chunking_does_not_matter() {
    let (bytes, want) = everything();
    let mut reader = Reader::default();
    for b in &bytes {
        reader.push(&[]).unwrap();
        reader.push(&[*b]).unwrap();
    }
    assert_eq!(reader.position(), bytes.len() as u64);
    assert_eq!(reader.finish().unwrap(), want);
    for seed in 0..200 {
        assert_eq!(read_in_pieces(&bytes, seed, 1 + seed as usize).unwrap(), want);
    }
}

#[test]
fn every_cut_is_an_error() {
    let (bytes, _) = everything();
    let (whole, complete) = (Model::parse(&bytes).unwrap(), complete_ends(&bytes));
    for cut in 0..bytes.len() {
        let got = Model::parse(&bytes[..cut]);
        if complete.contains(&cut) {
            assert_eq!(got.unwrap().graph, whole.graph);
        } else {
            let e = got.unwrap_err();
            let want = if cut == 0 { ErrorCode::EmptyModel } else { ErrorCode::TruncatedModel };
            // One or two bytes of the first field do not show yet that it is a model.
            assert!(e.code == want || cut < 2 && e.code == ErrorCode::NotOnnx, "{cut}: {e:?}");
            assert!(cut == 0 || e.message.contains(&format!("byte {cut}")), "{cut}: {e}");
        }
    }
}

/// Where a file may end without anyone noticing: between two top-level fields behind the graph and an operator set.
fn complete_ends(bytes: &[u8]) -> Vec<usize> {
    let (mut at, mut ends, mut met) = (0, Vec::new(), Vec::new());
    let number = |at: &mut usize| {
        let (mut v, mut shift) = (0usize, 0);
        loop {
            let b = bytes[*at];
            *at += 1;
            v |= usize::from(b & 0x7f) << shift;
            shift += 7;
            if b < 0x80 {
                return v;
            }
        }
    };
    while at < bytes.len() {
        let key = number(&mut at);
        let n = number(&mut at);
        at += if key & 7 == 2 { n } else { 0 };
        met.push(key >> 3);
        if met.contains(&7) && met.contains(&8) {
            ends.push(at);
        }
    }
    ends
}

#[test]
fn both_encodings_of_every_type() {
    let bits = |v: i64, width: usize| v.to_le_bytes()[..width].to_vec();
    // Type, field of its elements, the integers in the file, bytes per integer.
    let integers: &[(DType, u64, &[i64], usize)] = &[
        (DType::I32, 5, &[i32::MIN as i64, -1, 0, i32::MAX as i64], 4),
        (DType::I16, 5, &[-32768, -1, 0, 32767], 2),
        (DType::U16, 5, &[0, 1, 32768, 65535], 2),
        (DType::F16, 5, &[0x3c00, 0xc000, 0x7c00, 1], 2),
        (DType::Bf16, 5, &[0x3f80, 0xffff, 0, 1], 2),
        (DType::I8, 5, &[-128, -1, 0, 127], 1),
        (DType::U8, 5, &[0, 1, 128, 255], 1),
        (DType::Bool, 5, &[0, 1, 1, 0], 1),
        (DType::I64, 7, &[i64::MIN, -1, 0, i64::MAX], 8),
        (DType::U64, 11, &[0, -1, 1, i64::MIN], 8),
        (DType::U32, 11, &[0, 1, u32::MAX as i64, 7], 4),
    ];
    let mut met = Vec::new();
    for &(dtype, field, values, width) in integers {
        met.push(dtype);
        let want = values.iter().flat_map(|&v| bits(v, width)).collect::<Vec<_>>();
        let (shape, ty) = (packed(1, &[2, 2]), int(2, dtype as i64));
        for data in [packed(field, values), unpacked(field, values), len(9, &want)] {
            // Fields may come in any order, and lists in several pieces.
            for order in [[&shape, &ty, &data], [&data, &shape, &ty], [&ty, &data, &shape]] {
                let t = read_tensor(&order.map(Clone::clone)).unwrap();
                assert_eq!((t.dtype, &t.dims[..], &t.data), (dtype, &[2, 2][..], &bytes_of(&want)), "{dtype}");
            }
        }
        let halves = [shape, ty, packed(field, &values[..2]), unpacked(field, &values[2..])];
        assert_eq!(read_tensor(&halves).unwrap().data, bytes_of(&want), "{dtype}");
    }
    for (dtype, field, data, pieces) in [
        (DType::F32, 4, le(&[1.5f32, -0.0], |v| v.to_le_bytes()), [f32_field(4, 1.5), f32_field(4, -0.0)].concat()),
        (DType::F64, 10, le(&[1.5f64, -0.0], |v| v.to_le_bytes()), [f64_field(10, 1.5), f64_field(10, -0.0)].concat()),
    ] {
        met.push(dtype);
        for elements in [len(field, &data), pieces, len(9, &data)] {
            let t = read_tensor(&[elements, int(1, 2), int(2, dtype as i64)]).unwrap();
            assert_eq!((t.dtype, t.data), (dtype, bytes_of(&data)));
        }
    }
    for dtype in [DType::I4, DType::U4] {
        met.push(dtype);
        for elements in [packed(5, &[0x21, 0x0f]), len(9, [0x21, 0x0f])] {
            let t = read_tensor(&[int(1, 3), int(2, dtype as i64), elements]).unwrap();
            assert_eq!((t.dims, t.data), (vec![3], bytes_of(&[0x21, 0x0f])));
        }
    }
    met.push(DType::String);
    let t = read_tensor(&[int(1, 2), int(2, 8), len(6, "ü"), len(6, "")]).unwrap();
    assert_eq!(t.data, TensorData::Strings(vec!["ü".into(), String::new()]));
    assert!(DType::ALL.iter().all(|d| met.contains(d)), "an element type without a test");
}

#[test]
fn tensors_with_few_or_no_elements() {
    assert_eq!(read_tensor(&[int(2, 1), len(9, 2f32.to_le_bytes())]).unwrap(), f32s("w", &[], &[2.0]));
    assert_eq!(read_tensor(&[packed(1, &[3, 0]), int(2, 1)]).unwrap(), f32s("w", &[3, 0], &[]));
    assert_eq!(read_tensor(&[packed(1, &[0]), int(2, 1), len(9, []), len(4, [])]).unwrap(), f32s("w", &[0], &[]));
    // Any byte but 0 is true.
    assert_eq!(read_tensor(&[int(1, 3), int(2, 9), len(9, [0, 1, 7])]).unwrap().data, bytes_of(&[0, 1, 1]));
}

#[test]
fn tensors_that_contradict_themselves() {
    use ErrorCode::{InvalidModel, LimitExceeded, UnsupportedDtype};
    let four = len(9, [0; 4]);
    let cases: &[(&str, ErrorCode, &[Vec<u8>], &str)] = &[
        ("too few bytes", InvalidModel, &[int(1, 2), int(2, 1), four.clone()], "takes 8 bytes, 4 are there"),
        ("too many bytes", InvalidModel, &[int(1, 0), int(2, 1), four.clone()], "takes 0 bytes, 4 are there"),
        ("no bytes", InvalidModel, &[int(1, 1), int(2, 1)], "takes 4 bytes, 0 are there"),
        ("negative", InvalidModel, &[int(1, -1), int(2, 1), four.clone()], "impossible shape"),
        ("huge", LimitExceeded, &[packed(1, &[i64::MAX, i64::MAX]), int(2, 1), four.clone()], "more elements"),
        ("no type", UnsupportedDtype, &[int(1, 1), four.clone()], "undefined"),
        ("complex", UnsupportedDtype, &[int(1, 1), int(2, 14), four.clone()], "complex64"),
        ("new type", UnsupportedDtype, &[int(1, 1), int(2, 99), four.clone()], "element type 99"),
        ("two types", InvalidModel, &[int(2, 1), int(2, 6)], "data types 1 and 6"),
        ("two encodings", InvalidModel, &[int(2, 1), f32_field(4, 1.0), four.clone()], "both in float_data and in raw"),
        ("wrong field", InvalidModel, &[int(1, 1), int(2, 6), f32_field(4, 1.0)], "float_data"),
        ("wrong field", InvalidModel, &[int(1, 1), int(2, 1), int(7, 1)], "int64_data"),
        ("wrong field, type last", InvalidModel, &[int(1, 1), int(7, 1), int(2, 6)], "int64_data"),
        ("text in raw data", InvalidModel, &[int(1, 1), int(2, 8), four.clone()], "raw_data"),
        ("strings", InvalidModel, &[int(1, 2), int(2, 8), len(6, "a")], "1 strings, not 2"),
        ("not UTF-8", InvalidModel, &[int(1, 1), int(2, 8), len(6, b"a\xff")], "not UTF-8 from its byte 1"),
        ("does not fit", InvalidModel, &[int(1, 1), int(2, 3), int(5, 256)], "256, which does not fit"),
        ("does not fit", InvalidModel, &[int(1, 1), int(2, 12), int(11, 1 << 32)], "does not fit"),
        ("segment", InvalidModel, &[msg(3, &[int(1, 0)])], "segments"),
    ];
    for (what, code, fields, message) in cases {
        let e = read_tensor(fields).unwrap_err();
        assert_eq!(e.code, *code, "{what}: {e}");
        assert!(e.message.contains(message), "{what}: {e}");
        assert!(e.message.contains("\"w\""), "the error must name the tensor: {e}");
    }
}

#[test]
fn attributes_of_old_and_terse_writers() {
    // Without a type, the value that is there counts.
    assert_eq!(read_attribute(&[f32_field(2, 1.0)]).unwrap(), AttributeValue::Float(1.0));
    assert_eq!(read_attribute(&[int(3, 0)]).unwrap(), AttributeValue::Int(0));
    assert_eq!(read_attribute(&[len(4, "")]).unwrap(), AttributeValue::String(vec![]));
    assert_eq!(read_attribute(&[packed(8, &[1, 1])]).unwrap(), AttributeValue::Ints(vec![1, 1]));
    // With a type, a default value may be left out.
    assert_eq!(read_attribute(&[int(20, 1)]).unwrap(), AttributeValue::Float(0.0));
    assert_eq!(read_attribute(&[int(20, 7)]).unwrap(), AttributeValue::Ints(vec![]));
    for (fields, message) in [
        (vec![], "has no value"),
        (vec![int(3, 1), f32_field(2, 1.0)], "several values"),
        (vec![int(20, 4)], "holds none"),
        (vec![int(20, 15)], "unknown type 15"),
    ] {
        let e = read_attribute(&fields).unwrap_err();
        assert_eq!(e.code, ErrorCode::InvalidModel);
        assert!(e.message.contains(message) && e.message.contains("\"a\""), "{e}");
    }
}

#[test]
fn unknown_fields_are_skipped() {
    let junk = [int(1000, -1), len(1001, [0xff; 300]), f32_field(1002, 1.0), f64_field(1003, 1.0)].concat();
    let graph = [junk.clone(), len(2, "g"), msg(1, std::slice::from_ref(&junk))];
    let bytes = [junk.clone(), int(1, 8), msg(7, &graph), msg(8, &[int(2, 17)]), junk].concat();
    for read in [Model::parse(&bytes), read_in_pieces(&bytes, 1, 3)] {
        let model = read.unwrap();
        assert_eq!((&model.graph.name[..], model.graph.nodes.len(), model.opset("ai.onnx")), ("g", 1, Some(17)));
    }
}

#[test]
fn broken_protobuf() {
    let long = |n: usize| [vec![0x80; n], vec![1]].concat();
    let cases: &[(&str, Vec<u8>)] = &[
        ("group", varint(99 << 3 | 3)),
        ("end of a group", varint(99 << 3 | 4)),
        ("wire type 6", varint(99 << 3 | 6)),
        ("wire type 7", varint(99 << 3 | 7)),
        ("field 0", vec![0x02, 0x00]),
        ("field number of 30 bits", varint(1 << 32)),
        ("varint of 11 bytes", [varint(99 << 3), long(10)].concat()),
        ("varint of 65 bits", [varint(99 << 3), vec![0xff; 9], vec![2]].concat()),
        ("length beyond the message", [varint(2 << 3 | 2), varint(5), vec![0; 4]].concat()),
        ("length of 64 bits", [varint(2 << 3 | 2), varint(u64::MAX), vec![0; 4]].concat()),
        ("message beyond the one around it", [varint(1 << 3 | 2), varint(5), vec![0; 4]].concat()),
        ("varint beyond the message", varint(99 << 3).into_iter().chain([0x80]).collect()),
        ("fixed beyond the message", varint(99 << 3 | 1).into_iter().chain([0; 7]).collect()),
        ("name as a number", int(2, 1)),
        ("node as a number", int(1, 1)),
        ("packed varint beyond the list", msg(5, &[vec![0x0a, 0x01, 0x80], vec![0x01]])),
        ("floats of 5 bytes", msg(5, &[len(4, [0; 5])])),
        ("doubles of 4 bytes", msg(5, &[len(10, [0; 4])])),
        ("float as a varint", msg(5, &[int(4, 1)])),
        ("not UTF-8", len(2, b"\xc3\x28")),
    ];
    for (what, field) in cases {
        let bytes = model_of(std::slice::from_ref(field));
        for read in [Model::parse(&bytes), read_in_pieces(&bytes, 3, 2)] {
            let e = read.expect_err(what);
            assert_eq!(e.code, ErrorCode::InvalidModel, "{what}: {e}");
            assert!(e.message.contains("graph"), "the error must say where: {e}");
        }
    }
    // Longer than needed but within ten bytes is allowed.
    assert!(Model::parse(&model_of(&[[varint(99 << 3), vec![0x80, 0x80, 0]].concat()])).is_ok());
    let twice = [model_of(&[]), model_of(&[])].concat();
    assert!(Model::parse(&twice).unwrap_err().message.contains("twice"));
}

#[test]
fn files_that_are_no_models() {
    let cases: &[(&[u8], &str)] = &[
        (b"\xff\xd8\xff\xe0\0\x10JFIF\0\x01\x01", "JPEG"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "PNG"),
        (b"<!DOCTYPE html>\n<html><head><title>404</title>", "HTML"),
        (b"{\"error\": \"not found\"}", "JSON"),
        (b"404: Not Found", "text"),
        (b"PK\x03\x04\x14\0\0\0\x08\0", "ZIP"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\x03", "gzip"),
        (b"\x1c\0\0\0TFL3\x14\0\x20\0", "TensorFlow Lite"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS"),
        (b"RIFF\xff\xff\xff\xffWAVEfmt ", "WAV"),
        (&[0; 64], "not an ONNX model"),
        (&[0xaa; 64], "not an ONNX model"),
    ];
    for (bytes, what) in cases {
        for read in [Model::parse(bytes), read_in_pieces(bytes, 5, 4)] {
            let e = read.expect_err(what);
            assert_eq!(e.code, ErrorCode::NotOnnx, "{what}: {e}");
            assert!(e.message.contains("not an ONNX model"), "{e}");
        }
        assert!(Model::parse(bytes).unwrap_err().message.contains(what), "{what}");
    }
    assert_eq!(code(b""), ErrorCode::EmptyModel);
    let e = Model::parse(&[int(1, 8), msg(7, &[])].concat()).unwrap_err();
    assert_eq!(e.code, ErrorCode::TruncatedModel);
    assert!(e.message.contains("opset_import"), "{e}");
}

#[test]
fn an_error_stays() {
    let mut reader = Reader::default();
    let first = reader.push(&[b"\x08\x08\x3b" as &[u8], &[0; 100]].concat()).unwrap_err();
    assert_eq!(reader.push(&everything().0).unwrap_err(), first);
    assert_eq!(reader.finish().unwrap_err(), first);
}

#[test]
fn bodies_nest_up_to_the_limit() {
    let nested = |levels: usize| {
        let mut graph = vec![len(2, "innermost")];
        for _ in 0..levels {
            graph = vec![msg(1, &[len(4, "If"), msg(5, &[len(1, "then_branch"), msg(6, &graph), int(20, 5)])])];
        }
        model_of(&graph)
    };
    // A graph takes one message, each body three more.
    let model = Model::parse(&nested(33)).unwrap();
    assert_eq!(Model::parse(&model.to_bytes()).unwrap(), model);
    assert_eq!(code(&nested(34)), ErrorCode::LimitExceeded);
    assert_eq!(code(&nested(5000)), ErrorCode::LimitExceeded);
    let mut ty = msg(1, &[int(1, 1)]);
    for _ in 0..3000 {
        ty = msg(4, &[msg(1, &[ty])]);
    }
    assert_eq!(code(&model_of(&[msg(11, &[msg(2, &[ty])])])), ErrorCode::LimitExceeded);
}

#[test]
fn limits_are_kept() {
    let read = |limits: Limits, bytes: &[u8]| {
        let mut reader = Reader::new(limits);
        reader.push(bytes)?;
        reader.finish()
    };
    let (bytes, want) = everything();
    let n = bytes.len() as u64;
    assert_eq!(read(Limits { max_bytes: n, ..Limits::default() }, &bytes).unwrap(), want);
    for limits in [
        Limits { max_bytes: n - 1, ..Limits::default() },
        Limits { max_messages: 20, ..Limits::default() },
        Limits { max_depth: 3, ..Limits::default() },
    ] {
        assert_eq!(read(limits, &bytes).unwrap_err().code, ErrorCode::LimitExceeded, "{limits:?}");
    }
}

#[test]
fn external_data() {
    let entry = |k: &str, v: &str| msg(13, &[len(1, k), len(2, v)]);
    let outside = |entries: &[Vec<u8>]| {
        read_tensor(&[vec![packed(1, &[2, 2]), int(2, 1)], entries.to_vec(), vec![int(14, 1)]].concat())
    };
    let t = outside(&[entry("location", "a/w.bin"), entry("offset", "4096"), entry("checksum", "abc")]).unwrap();
    let external = ExternalData { location: "a/w.bin".into(), offset: 4096, length: 16, checksum: Some("abc".into()) };
    assert_eq!(t.data, TensorData::External(external));
    assert_eq!(t.clone().into_tensor().unwrap_err().code, ErrorCode::ExternalData);
    for bad in [
        vec![],
        vec![entry("location", "../w.bin")],
        vec![entry("location", "/w.bin")],
        vec![entry("location", "https://example.com/w.bin")],
        vec![entry("location", "w.bin"), entry("length", "15")],
        vec![entry("location", "w.bin"), entry("length", "x")],
        vec![entry("location", "w.bin"), entry("offset", "-1")],
        vec![entry("location", "w.bin"), entry("offset", "18446744073709551615")],
    ] {
        let e = outside(&bad).unwrap_err();
        assert_eq!(e.code, ErrorCode::ExternalData, "{e}");
        assert!(e.message.contains("\"w\""), "{e}");
    }

    // In an initializer, an attribute of a body, and a function.
    let tensor = |name: &str| TensorProto { name: name.into(), ..t.clone() };
    let node = |value| Node { attributes: vec![Attribute { name: "v".into(), value }], ..Node::default() };
    let body = Graph { nodes: vec![node(AttributeValue::Tensor(tensor("b")))], ..Graph::default() };
    let mut model = Model {
        opset_imports: vec![OpsetId { domain: String::new(), version: 17 }],
        graph: Graph {
            initializers: vec![tensor("a")],
            nodes: vec![node(AttributeValue::Graph(Box::new(body)))],
            ..Graph::default()
        },
        functions: vec![Function { nodes: vec![node(AttributeValue::Tensor(tensor("c")))], ..Function::default() }],
        ..Model::default()
    };
    assert_eq!(Model::parse(&model.to_bytes()).unwrap(), model);
    assert_eq!(model.external().count(), 3);
    assert!(model.external().all(|r| (r.location, r.offset, r.length) == ("a/w.bin", 4096, 16)));
    let short = model.resolve_external(|_, _, _| AlignedBytes::zeroed(15)).unwrap_err();
    assert_eq!(short.code, ErrorCode::ExternalData);
    let mut asked = 0u8;
    model
        .resolve_external(|location, offset, length| {
            assert_eq!((location, offset, length), ("a/w.bin", 4096, 16));
            asked += 1;
            AlignedBytes::copy_of(&[asked; 16])
        })
        .unwrap();
    assert_eq!((asked, model.external().count()), (3, 0));
    let mut first_bytes = Vec::new();
    model.each_tensor(&mut |t| {
        if let TensorData::Bytes(b) = &t.data {
            first_bytes.push(b.as_ref()[0]);
        }
    });
    first_bytes.sort_unstable();
    assert_eq!(first_bytes, [1, 2, 3]);
}

#[test]
fn sparse_tensors_become_dense() {
    let i64s = |dims: &[usize], v: &[i64]| TensorProto {
        name: String::new(),
        dtype: DType::I64,
        dims: dims.into(),
        data: bytes_of(&le(v, |v| v.to_le_bytes())),
    };
    let values = || f32s("s", &[2], &[5.0, 6.0]);
    let sparse = |indices| SparseTensor { values: values(), indices, dims: vec![2, 3] };
    let want = f32s("s", &[2, 3], &[0.0, 5.0, 0.0, 0.0, 0.0, 6.0]);
    assert_eq!(sparse(i64s(&[2], &[1, 5])).to_dense(1 << 20).unwrap(), want);
    assert_eq!(sparse(i64s(&[2, 2], &[0, 1, 1, 2])).to_dense(1 << 20).unwrap(), want);
    let limit = sparse(i64s(&[2], &[1, 5])).to_dense(23).unwrap_err();
    assert_eq!(limit.code, ErrorCode::LimitExceeded);
    for bad in [i64s(&[2], &[1, 6]), i64s(&[2], &[-1, 0]), i64s(&[2, 2], &[0, 3, 0, 0]), i64s(&[1], &[0])] {
        assert_eq!(sparse(bad).to_dense(1 << 20).unwrap_err().code, ErrorCode::InvalidModel);
    }
}

/// The real models, or a note that they are not there.
fn real_models() -> Vec<(String, Vec<u8>)> {
    let folder = std::env::var("WEBLANE_MODEL_MIRROR")
        .unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/models").into());
    ["mnist", "silero_vad_v5", "squeezenet_fp16", "ultraface_rfb_320", "yolox_nano"]
        .iter()
        .filter_map(|name| match std::fs::read(format!("{folder}/{name}/model.onnx")) {
            Ok(bytes) => Some((name.to_string(), bytes)),
            Err(e) => {
                eprintln!("skipped {name}: no model.onnx in the mirror ({e})");
                None
            }
        })
        .collect()
}

#[test]
fn real_models_read() {
    // Nodes and initializers, as the onnx package counts them.
    let counts = |name: &str| match name {
        "mnist" => (12, 8, 7),
        "silero_vad_v5" => (5, 0, 16),
        "squeezenet_fp16" => (66, 52, 7),
        "ultraface_rfb_320" => (242, 244, 9),
        _ => (369, 236, 11),
    };
    for (name, bytes) in real_models() {
        let model = Model::parse(&bytes).unwrap();
        let got = (model.graph.nodes.len(), model.graph.initializers.len(), model.opset("").unwrap());
        assert_eq!(got, counts(&name), "{name}");
        assert_eq!(Model::parse(&model.to_bytes()).unwrap(), model, "{name}");
        for seed in 0..4 {
            assert_eq!(read_in_pieces(&bytes, seed, 1 << (4 * seed)).unwrap(), model, "{name}");
        }
    }
}

#[test]
fn real_models_cut_anywhere() {
    for (name, bytes) in real_models() {
        let (whole, complete) = (Model::parse(&bytes).unwrap(), complete_ends(&bytes));
        // Evenly spread, and the whole of both ends.
        let spread = (0..250).map(|i| bytes.len() * i / 250);
        for cut in spread.chain(0..50).chain(bytes.len() - 100..bytes.len()) {
            let got = Model::parse(&bytes[..cut]);
            if complete.contains(&cut) {
                assert_eq!(got.unwrap().graph, whole.graph, "{name} at {cut}");
                continue;
            }
            let e = got.err().unwrap_or_else(|| panic!("{name} is accepted when cut at {cut}"));
            let codes = [ErrorCode::TruncatedModel, if cut == 0 { ErrorCode::EmptyModel } else { ErrorCode::NotOnnx }];
            assert!(e.code == codes[0] || cut < 2 && e.code == codes[1], "{name} at {cut}: {e:?}");
        }
    }
}
