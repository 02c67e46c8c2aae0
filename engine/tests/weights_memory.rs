//! What a session holds: its weights once, in the form that its kernels read, whatever shapes it has seen; and the same
//! numbers as ever where a constant is read in other ways too.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use weblane_engine::onnx::{
    Attribute, AttributeValue, Dim, Graph, Model, Node, OpsetId, TensorProto, TypeProto, ValueInfo,
};
use weblane_engine::session::Optimize;
use weblane_engine::{DType, Loader, Options, Session, Tensor};

/// Counts the bytes that the current thread holds.
struct Counting;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

// SAFETY: every call is handed on to the system's allocator as it came; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.set(LIVE.get() + layout.size() as isize);
        PEAK.set(PEAK.get().max(LIVE.get()));
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        LIVE.set(LIVE.get() - layout.size() as isize);
        // SAFETY: the caller's promise; the block came from `System`.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The result, the bytes held by it, and the most that were held meanwhile.
fn measured<T>(f: impl FnOnce() -> T) -> (T, usize, usize) {
    let base = LIVE.get();
    PEAK.set(base);
    let result = f();
    (result, (LIVE.get() - base) as usize, (PEAK.get() - base) as usize)
}

const OPTIMIZE: [Optimize; 2] = [Optimize::All, Optimize::None];

fn options(optimize: Optimize) -> Options {
    // One thread: the allocator counts for the current one.
    Options { optimize, threads: 1, ..Options::default() }
}

fn noise(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn weights(name: &str, dims: &[usize], seed: u32) -> TensorProto {
    let values = noise(dims.iter().product(), seed);
    TensorProto::new(name, &Tensor::from_slice(dims, &values).unwrap()).unwrap()
}

/// So small that a chain of products does not magnify rounding.
fn tame_weights(name: &str, dims: &[usize], seed: u32) -> TensorProto {
    let values: Vec<f32> = noise(dims.iter().product(), seed).iter().map(|v| v / 16.0).collect();
    TensorProto::new(name, &Tensor::from_slice(dims, &values).unwrap()).unwrap()
}

fn node(op_type: &str, inputs: &[&str], output: &str) -> Node {
    Node {
        op_type: op_type.into(),
        inputs: inputs.iter().map(|s| (*s).into()).collect(),
        outputs: vec![output.into()],
        ..Node::default()
    }
}

fn with(mut node: Node, name: &str, value: AttributeValue) -> Node {
    node.attributes.push(Attribute { name: name.into(), value });
    node
}

/// A size is a number or a name.
fn value(name: &str, dtype: DType, dims: &[&str]) -> ValueInfo {
    let dim = |d: &&str| d.parse().map_or_else(|_| Dim::Param((*d).into()), Dim::Known);
    let shape = Some(dims.iter().map(dim).collect());
    ValueInfo { name: name.into(), ty: Some(TypeProto::Tensor { elem_type: dtype as i32, shape }) }
}

fn model(inputs: Vec<ValueInfo>, initializers: Vec<TensorProto>, nodes: Vec<Node>, outputs: Vec<ValueInfo>) -> Model {
    Model {
        ir_version: 8,
        opset_imports: vec![OpsetId { domain: String::new(), version: 17 }],
        graph: Graph { inputs, initializers, nodes, outputs, ..Graph::default() },
        ..Model::default()
    }
}

fn run(session: &mut Session, feeds: &[(&str, &Tensor)]) -> Vec<f32> {
    let views: Vec<_> = feeds.iter().map(|(n, t)| (*n, t.view())).collect();
    session.run(&views).unwrap()[0].as_slice::<f32>().unwrap().to_vec()
}

/// `x w` of row-major matrices, `n` columns.
fn product(x: &[f32], w: &[f32], n: usize) -> Vec<f32> {
    let k = w.len() / n;
    let dot = |row: &[f32], j: usize| (0..k).map(|i| f64::from(row[i]) * f64::from(w[i * n + j])).sum::<f64>() as f32;
    x.chunks_exact(k).flat_map(|row| (0..n).map(move |j| dot(row, j))).collect()
}

fn assert_near(got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len());
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= 1e-4 * (1.0 + w.abs()), "element {i}: {g}, {w} was wanted");
    }
}

/// Products, convolutions of all kinds, a batch normalisation and a recurrent layer: some 20 MB of weights, none above
/// 4 MB, so that a second copy of all of them is told apart from one of the largest.
fn many_kinds() -> Model {
    let mut initializers = vec![
        tame_weights("stem", &[64, 3, 3, 3], 1),
        tame_weights("depthwise", &[64, 1, 3, 3], 2),
        tame_weights("transposed", &[64, 32, 2, 2], 3),
        tame_weights("enter", &[32, 1024], 4),
        tame_weights("lstm.w", &[1, 1024, 1024], 5),
        tame_weights("lstm.r", &[1, 1024, 256], 6),
        tame_weights("lstm.b", &[1, 2048], 7),
        tame_weights("leave", &[10, 256], 8),
        tame_weights("leave.b", &[10], 9),
    ];
    let mut nodes = vec![
        node("Conv", &["x", "stem"], "a"),
        with(node("Conv", &["a", "depthwise"], "b"), "group", AttributeValue::Int(64)),
        node("ConvTranspose", &["b", "transposed"], "c"),
        node("GlobalAveragePool", &["c"], "d"),
        with(node("Flatten", &["d"], "e"), "axis", AttributeValue::Int(1)),
        node("MatMul", &["e", "enter"], "h0"),
    ];
    for i in 0..3 {
        let w = format!("square{i}");
        initializers.push(tame_weights(&w, &[1024, 1024], 20 + i));
        nodes.push(node("MatMul", &[&format!("h{i}"), &w], &format!("s{i}")));
        nodes.push(node("Tanh", &[&format!("s{i}")], &format!("h{}", i + 1)));
    }
    let axes = Tensor::from_slice(&[1], &[0i64]).unwrap();
    initializers.push(TensorProto::new("axes", &axes).unwrap());
    nodes.push(node("Unsqueeze", &["h3", "axes"], "steps"));
    let lstm = Node {
        outputs: vec![String::new(), "last".into()],
        ..node("LSTM", &["steps", "lstm.w", "lstm.r", "lstm.b"], "")
    };
    nodes.push(with(lstm, "hidden_size", AttributeValue::Int(256)));
    nodes.push(node("Squeeze", &["last", "axes"], "state"));
    nodes.push(with(node("Gemm", &["state", "leave", "leave.b"], "y"), "transB", AttributeValue::Int(1)));
    let image = value("x", DType::F32, &["batch", "3", "height", "width"]);
    model(vec![image], initializers, nodes, vec![value("y", DType::F32, &["batch", "10"])])
}

fn image(batch: usize, size: usize) -> Tensor {
    // The first image is the same in every batch.
    Tensor::from_slice(&[batch, 3, size, size], &noise(batch * 3 * size * size, 99)).unwrap()
}

#[test]
fn weights_are_held_once() {
    let bytes = many_kinds().to_bytes();
    const LARGEST: usize = 4 << 20;
    for optimize in OPTIMIZE {
        let load = || {
            let mut loader = Loader::new(options(optimize)).expect_len(bytes.len() as u64);
            bytes.chunks(65_536).try_for_each(|c| loader.push(c)).unwrap();
            let (model, options) = loader.finish().unwrap();
            Session::new(model, options).unwrap()
        };
        let (mut session, held, peak) = measured(load);
        // Packing pads columns to whole vectors, and small operands stay as they are.
        let fits = |held: usize| held < bytes.len() + bytes.len() / 20;
        assert!(fits(held), "{held} bytes after loading a model of {} ({optimize:?})", bytes.len());
        assert!(peak < bytes.len() + 2 * LARGEST, "at most {peak} bytes while loading ({optimize:?})");
        // What the session says of the model is what stands in it.
        let info = session.info().constant_bytes;
        assert!(info.abs_diff(bytes.len()) < bytes.len() / 100, "{info} bytes of constants");

        let images = [image(1, 8), image(2, 8), image(1, 12)];
        let (outputs, held, _) = measured(|| images.each_ref().map(|x| run(&mut session, &[("x", x)])));
        assert!(held < 4 << 20, "{held} more bytes after runs of three shapes ({optimize:?})");
        assert_near(&outputs[1][..10], &outputs[0]);
        // A session of its own for each shape agrees to the bit.
        for (x, output) in images.iter().zip(&outputs) {
            assert_eq!(&run(&mut load(), &[("x", x)]), output);
        }
    }
}

#[test]
fn quantised_weights_are_held_once_as_real_numbers() {
    // Scales for columns, and real activations: 1 MB each in the file, 4 MB packed.
    const N: usize = 1024;
    let bytes: Vec<i8> = (0..N * N).map(|i| (i * 37 % 251) as u8 as i8).collect();
    let scale = Tensor::from_slice(&[N], &vec![1f32 / 4096.0; N]).unwrap();
    let mut initializers = vec![TensorProto::new("scale", &scale).unwrap()];
    let mut nodes = Vec::new();
    for i in 0..3 {
        let [w, real] = [format!("w{i}"), format!("real{i}")];
        initializers.push(TensorProto::new(&w, &Tensor::from_slice(&[N, N], &bytes).unwrap()).unwrap());
        nodes.push(node("DequantizeLinear", &[&w, "scale"], &real));
        nodes.push(node("MatMul", &[&format!("h{i}"), &real], &format!("h{}", i + 1)));
    }
    let (inputs, outputs) = (value("h0", DType::F32, &["rows", "1024"]), value("h3", DType::F32, &["rows", "1024"]));
    let model = model(vec![inputs], initializers, nodes, vec![outputs]);
    let real = 3 * 4 * N * N;
    let (mut session, held, peak) = measured(|| Session::new(model, options(Optimize::All)).unwrap());
    // The model was there before and is gone: its bytes count as given back.
    let held = held.wrapping_add(3 * N * N);
    assert!(held.abs_diff(real) < real / 20, "{held} bytes for {real} of weights");
    assert!(peak < real + 2 * 4 * N * N, "at most {peak} bytes while loading");
    let x = Tensor::from_slice(&[16, N], &noise(16 * N, 2)).unwrap();
    let (_, held, _) = measured(|| run(&mut session, &[("h0", &x)]));
    assert!(held < N * N, "{held} more bytes after a run");
}

#[test]
fn a_constant_that_is_read_as_it_stands_too_keeps_its_elements() {
    // Read by a product twice, by an Add, and as an output.
    let w = noise(16 * 16, 1);
    for optimize in OPTIMIZE {
        let nodes =
            vec![node("MatMul", &["x", "w"], "a"), node("MatMul", &["a", "w"], "b"), node("Add", &["b", "w"], "c")];
        let outputs = vec![value("c", DType::F32, &["16", "16"]), value("w", DType::F32, &["16", "16"])];
        let inputs = vec![value("x", DType::F32, &["n", "16"])];
        let model = model(inputs, vec![weights("w", &[16, 16], 1)], nodes, outputs);
        let mut session = Session::new(model, options(optimize)).unwrap();
        let x = Tensor::from_slice(&[16, 16], &noise(256, 2)).unwrap();
        let results = session.run(&[("x", x.view())]).unwrap();
        let a = product(x.as_slice().unwrap(), &w, 16);
        let want: Vec<f32> = product(&a, &w, 16).iter().zip(&w).map(|(a, b)| a + b).collect();
        assert_near(results[0].as_slice().unwrap(), &want);
        assert_eq!(results[1].as_slice::<f32>().unwrap(), w);
    }
}

#[test]
fn steps_whose_shapes_depend_on_data_use_packed_weights() {
    // The positions of x above 0, times a matrix: how many there are is known only at run time.
    let w = noise(2 * 8, 3);
    for optimize in OPTIMIZE {
        let zero = Tensor::scalar(0f32).unwrap();
        let initializers = vec![weights("w", &[2, 8], 3), TensorProto::new("zero", &zero).unwrap()];
        let nodes = vec![
            node("Greater", &["x", "zero"], "mask"),
            node("NonZero", &["mask"], "found"),
            with(node("Cast", &["found"], "columns"), "to", AttributeValue::Int(1)),
            node("Transpose", &["columns"], "rows"),
            node("MatMul", &["rows", "w"], "y"),
        ];
        let inputs = vec![value("x", DType::F32, &["h", "w"])];
        let model = model(inputs, initializers, nodes, vec![value("y", DType::F32, &["n", "8"])]);
        let mut session = Session::new(model, options(optimize)).unwrap();
        for values in [[1f32, -1.0, 2.0, -2.0, 3.0, 4.0], [-1.0, -1.0, 2.0, -1.0, -1.0, -1.0]] {
            let x = Tensor::from_slice(&[2, 3], &values).unwrap();
            let places = (0..6).filter(|&i| values[i] > 0.0);
            let rows: Vec<f32> = places.flat_map(|i| [(i / 3) as f32, (i % 3) as f32]).collect();
            assert_near(&run(&mut session, &[("x", &x)]), &product(&rows, &w, 8));
        }
    }
}

#[test]
fn a_left_operand_that_the_shapes_decide_is_no_reason_to_fold() {
    let w = noise(2 * 4, 4);
    for optimize in OPTIMIZE {
        let nodes = vec![
            node("Shape", &["x"], "shape"),
            with(node("Cast", &["shape"], "sizes"), "to", AttributeValue::Int(1)),
            node("MatMul", &["sizes", "w"], "y"),
        ];
        let inputs = vec![value("x", DType::F32, &["h", "w"])];
        let model = model(inputs, vec![weights("w", &[2, 4], 4)], nodes, vec![value("y", DType::F32, &["4"])]);
        let mut session = Session::new(model, options(optimize)).unwrap();
        for dims in [[2, 3], [5, 1]] {
            let y = run(&mut session, &[("x", &Tensor::zeros(DType::F32, &dims).unwrap())]);
            assert_near(&y, &product(&dims.map(|d| d as f32), &w, 4));
        }
    }
}

#[test]
fn bodies_see_the_constants_around_them() {
    // A loop reads w of the graph around it, which a product there reads too; the branches of an If have weights of
    // their own besides.
    let w = noise(8 * 8, 5);
    let graph = |nodes: Vec<Node>, initializers: Vec<TensorProto>, out: &str| {
        let outputs = vec![value(out, DType::F32, &["n", "8"])];
        Box::new(Graph { nodes, initializers, outputs, ..Graph::default() })
    };
    for (optimize, has_if) in OPTIMIZE.into_iter().flat_map(|o| [(o, false), (o, true)]) {
        let mut nodes = vec![node("MatMul", &["x", "w"], "a"), node("MatMul", &["a", "v"], "b")];
        let mut inputs = vec![value("x", DType::F32, &["n", "8"])];
        if has_if {
            let then = graph(vec![node("MatMul", &["b", "w"], "t")], vec![], "t");
            let own = vec![weights("own", &[8, 8], 6)];
            let sum = vec![node("MatMul", &["b", "own"], "o"), node("Add", &["o", "w"], "e")];
            let branch = with(node("If", &["cond"], "c"), "then_branch", AttributeValue::Graph(then));
            nodes.push(with(branch, "else_branch", AttributeValue::Graph(graph(sum, own, "e"))));
            inputs.push(value("cond", DType::Bool, &[]));
        } else {
            nodes.push(node("Identity", &["b"], "c"));
        }
        let step = Graph {
            inputs: vec![
                value("i", DType::I64, &[]),
                value("go", DType::Bool, &[]),
                value("s", DType::F32, &["n", "8"]),
            ],
            outputs: vec![value("on", DType::Bool, &[]), value("next", DType::F32, &["n", "8"])],
            ..*graph(vec![node("MatMul", &["s", "w"], "next"), node("Identity", &["go"], "on")], vec![], "next")
        };
        let count = TensorProto::new("count", &Tensor::scalar(2i64).unwrap()).unwrap();
        nodes.push(with(node("Loop", &["count", "", "c"], "y"), "body", AttributeValue::Graph(Box::new(step))));
        let initializers = vec![weights("w", &[8, 8], 5), weights("v", &[8, 8], 8), count];
        let model = model(inputs, initializers, nodes, vec![value("y", DType::F32, &["n", "8"])]);
        let mut session = Session::new(model, options(optimize)).unwrap();
        for condition in [true, false, true] {
            let x = noise(8 * 8, 7).iter().map(|v| v / 4.0).collect::<Vec<_>>();
            let b = product(&product(&x, &w, 8), &noise(64, 8), 8);
            let c: Vec<f32> = match (has_if, condition) {
                (false, _) => b,
                (true, true) => product(&b, &w, 8),
                (true, false) => product(&b, &noise(64, 6), 8).iter().zip(&w).map(|(p, q)| p + q).collect(),
            };
            let want = product(&product(&c, &w, 8), &w, 8);
            let x = Tensor::from_slice(&[8, 8], &x).unwrap();
            let cond = Tensor::from_bools(&[], &[condition]).unwrap();
            let feeds = [("x", &x), ("cond", &cond)];
            assert_near(&run(&mut session, &feeds[..1 + usize::from(has_if)]), &want);
        }
    }
}
