//! What the reader allocates: about the weights once, and never more than the input accounts for, whatever it claims.

use proptest::prelude::*;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use weblane_engine::error::ErrorCode;
use weblane_engine::onnx::{Graph, Limits, Model, Node, OpsetId, Reader, TensorData, TensorProto};
use weblane_engine::storage::AlignedBytes;
use weblane_engine::tensor::DType;

/// Counts the bytes that the current thread holds. A reallocation counts as both blocks, as it may need both.
struct Counting;

thread_local! {
    static LIVE: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call is handed on to the system's allocator as it came; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.set(LIVE.get().wrapping_add(layout.size()));
        PEAK.set(PEAK.get().max(LIVE.get()));
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        LIVE.set(LIVE.get().wrapping_sub(layout.size()));
        // SAFETY: the caller's promise; the block came from `System`.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The result, and the most bytes that were held meanwhile beyond those held before.
fn peak_of<T>(f: impl FnOnce() -> T) -> (T, usize) {
    // A margin, since memory from before may be freed meanwhile.
    let base = LIVE.replace(1 << 40);
    PEAK.set(1 << 40);
    let result = f();
    LIVE.set(base.wrapping_add(LIVE.get().wrapping_sub(1 << 40)));
    (result, PEAK.get() - (1 << 40))
}

/// What may be allocated for `n` bytes of input: a message of two bytes becomes a struct of some hundred, lists grow
/// by doubling, and up to 2 MiB are taken on trust.
fn bound(n: usize) -> usize {
    (3 << 20) + 1024 * n
}

fn model_with(tensors: Vec<TensorProto>) -> Model {
    let nodes = vec![Node { op_type: "Relu".into(), inputs: vec!["w".into()], ..Node::default() }];
    Model {
        ir_version: 8,
        opset_imports: vec![OpsetId { domain: String::new(), version: 17 }],
        graph: Graph { nodes, initializers: tensors, ..Graph::default() },
        ..Model::default()
    }
}

fn weights(bytes: usize) -> TensorProto {
    let data = TensorData::Bytes(AlignedBytes::zeroed(bytes).unwrap());
    TensorProto { name: "w".into(), dtype: DType::F32, dims: vec![bytes / 4], data }
}

fn read(bytes: &[u8], piece: usize, expect: u64) -> weblane_engine::Result<Model> {
    let mut reader = Reader::new(Limits::default()).expect_len(expect);
    bytes.chunks(piece).try_for_each(|c| reader.push(c))?;
    reader.finish()
}

#[test]
fn weights_are_held_once() {
    const MIB: usize = 1 << 20;
    let one = model_with(vec![weights(64 * MIB)]).to_bytes();
    let many = model_with((0..16).map(|_| weights(4 * MIB)).collect()).to_bytes();
    for bytes in [&one, &many] {
        let (model, peak) = peak_of(|| read(bytes, 10_007, bytes.len() as u64));
        assert!(model.is_ok());
        assert!(peak < 64 * MIB + MIB / 16, "{peak} bytes for 64 MiB of weights");
        // Unknown length: what is announced must be earned by what has arrived.
        let (model, peak) = peak_of(|| read(bytes, 10_007, 0));
        let model = model.unwrap();
        assert!(peak < 100 * MIB, "{peak} bytes for 64 MiB of weights of unknown length");
        drop(model);
    }
    // After growth, nothing is left over.
    let (model, _) = peak_of(|| read(&one, 10_007, 0));
    let (_, copy) = peak_of(|| model.clone());
    let held = {
        let before = LIVE.get();
        drop(model);
        before - LIVE.get()
    };
    assert!(held <= copy + 4096, "{held} bytes are held, {copy} are needed");
}

#[test]
fn announced_sizes_are_not_believed() {
    let huge = 0x7fff_0000u32;
    let varint = |mut v: u32| {
        let mut out = Vec::new();
        while v >= 0x80 {
            out.push(v as u8 | 0x80);
            v >>= 7;
        }
        out.push(v as u8);
        out
    };
    let key_len = |key: u8, len: u32| [vec![key], varint(len)].concat();
    // A graph, an initializer and its data that claim 2 GB, in each encoding; and huge texts and lists.
    let tensor = [vec![0x08, 8], key_len(7 << 3 | 2, huge), key_len(5 << 3 | 2, huge - 100)].concat();
    // Field of the elements, element type, its width.
    for (data, dtype, width) in
        [(9u8, 1, 4), (4, 1, 4), (10, 11, 8), (5, 6, 4), (7, 7, 8), (11, 13, 8), (6, 8, 1), (8, 1, 4)]
    {
        let shape = [vec![0x10, dtype, 0x08], varint((huge - 200) / width)].concat();
        for head in [vec![], shape] {
            let bytes = [&tensor[..], &head, &key_len(data << 3 | 2, huge - 200), &[0; 8]].concat();
            let (result, peak) = peak_of(|| read(&bytes, 7, 0));
            assert_eq!(result.unwrap_err().code, ErrorCode::TruncatedModel, "field {data}");
            assert!(peak <= bound(bytes.len()), "{peak} bytes for field {data} of a file of {}", bytes.len());
        }
    }
}

/// A valid model with something of everything, to be damaged.
fn seed() -> Vec<u8> {
    let mut model = model_with(vec![weights(64)]);
    let mut body = model.graph.clone();
    body.name = "body".into();
    let attribute = |name: &str, value| weblane_engine::onnx::Attribute { name: name.into(), value };
    use weblane_engine::onnx::AttributeValue as V;
    model.graph.nodes[0].attributes = vec![
        attribute("body", V::Graph(Box::new(body))),
        attribute("ints", V::Ints(vec![1, 300, -1])),
        attribute("floats", V::Floats(vec![1.0, 2.0])),
        attribute("strings", V::Strings(vec![b"a".to_vec()])),
    ];
    model.to_bytes()
}

fn check(bytes: &[u8], piece: usize, expect: u64) {
    let (result, peak) = peak_of(|| read(bytes, piece, expect));
    assert!(peak <= bound(bytes.len()), "{peak} bytes for an input of {}", bytes.len());
    match (result, Model::parse(bytes)) {
        (Err(a), Err(b)) => assert_eq!(a, b, "the chunking decides about the error"),
        (Ok(a), Ok(b)) => {
            // As bytes, since floats may be NaN.
            let written = a.to_bytes();
            assert_eq!(written, b.to_bytes());
            assert_eq!(written, Model::parse(&written).expect("what was written").to_bytes());
        }
        (a, b) => panic!("the chunking decides: {a:?} against {b:?}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..300), piece in 1usize..40) {
        check(&bytes, piece, 0);
    }

    // Keys and lengths that fit together more often than random ones, inside a graph.
    #[test]
    fn random_fields(
        fields in proptest::collection::vec((1u8..16, 0u8..6, proptest::collection::vec(0u8..32, 0..12)), 0..40),
        nest in proptest::collection::vec(1u8..16, 0..6),
        piece in 1usize..40,
    ) {
        let mut bytes = Vec::new();
        for (number, wire_type, content) in fields {
            bytes.push(number << 3 | wire_type);
            if wire_type == 2 {
                bytes.push(content.len() as u8);
            }
            bytes.extend(content);
        }
        for number in nest.into_iter().chain([7]) {
            let mut outer = vec![number << 3 | 2];
            let mut n = bytes.len();
            while n >= 0x80 {
                outer.push(n as u8 | 0x80);
                n >>= 7;
            }
            outer.push(n as u8);
            outer.extend(bytes);
            bytes = outer;
        }
        bytes.extend([8 << 3 | 2, 2, 2 << 3, 17]);
        check(&bytes, piece, 0);
    }

    #[test]
    fn damaged_models(
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>(), 0u8..4), 1..6),
        piece in 1usize..40,
        expect in prop_oneof![Just(0), Just(1000), Just(1 << 20)],
    ) {
        let mut bytes = seed();
        for (at, value, how) in changes {
            let at = at.index(bytes.len());
            match how {
                0 => bytes[at] = value,
                1 => bytes[at] ^= 1 << (value & 7),
                2 => bytes.insert(at, value),
                _ => { bytes.remove(at); }
            }
        }
        check(&bytes, piece, expect);
    }
}

#[test]
fn many_tiny_messages() {
    // Two bytes each: functions, opsets, then nodes, values and bodies inside of graphs.
    for (outer, inner) in [(0, 25u32), (0, 8), (7, 1), (7, 11)] {
        let one = [(inner << 3 | 2) as u8 | if inner > 15 { 0x80 } else { 0 }];
        let field = if inner > 15 { vec![one[0], (inner >> 4) as u8, 0] } else { vec![one[0], 0] };
        let content = field.repeat(50_000);
        let mut bytes = vec![0x08, 8];
        if outer != 0 {
            let mut n = content.len();
            bytes.push(outer << 3 | 2);
            while n >= 0x80 {
                bytes.push(n as u8 | 0x80);
                n >>= 7;
            }
            bytes.push(n as u8);
        }
        bytes.extend(content);
        let (_, peak) = peak_of(|| read(&bytes, 4096, 0));
        assert!(peak <= bound(bytes.len()), "{peak} bytes for an input of {}", bytes.len());
    }
    let tiny = Limits { max_messages: 1000, ..Limits::default() };
    let mut reader = Reader::new(tiny);
    let flood = [vec![0x08u8, 8], [8 << 3 | 2, 0].repeat(1001)].concat();
    assert_eq!(reader.push(&flood).unwrap_err().code, ErrorCode::LimitExceeded);
}
