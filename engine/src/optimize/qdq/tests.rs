use super::*;
use crate::fact::Fact;
use crate::onnx::AttributeValue;
use crate::ops::split::Split;
use crate::optimize::optimize;
use crate::optimize::testing::{Net, float, int, ints, names, noise, with_cx};
use std::collections::BTreeSet;

fn bytes(n: &mut Net, dims: &[usize], values: &[u8]) -> ValueId {
    n.graph.add_constant("constant", Tensor::from_slice(dims, values).unwrap())
}

fn q(n: &mut Net, x: ValueId, scale: f32, zero: u8) -> ValueId {
    let (scale, zero) = (n.scalar(scale), bytes(n, &[], &[zero]));
    n.op("QuantizeLinear", &[x, scale, zero])
}

fn dq(n: &mut Net, x: ValueId, scale: f32, zero: u8) -> ValueId {
    let (scale, zero) = (n.scalar(scale), bytes(n, &[], &[zero]));
    n.op("DequantizeLinear", &[x, scale, zero])
}

fn string(text: &str) -> AttributeValue {
    AttributeValue::String(text.into())
}

/// There and back.
fn qdq(n: &mut Net, x: ValueId, scale: f32, zero: u8) -> ValueId {
    let x = q(n, x, scale, zero);
    dq(n, x, scale, zero)
}

/// Signed weights with a scale for each index of an axis, and the scales.
fn weights(n: &mut Net, dims: &[usize], axis: usize, seed: u64) -> (ValueId, Vec<f32>) {
    let values: Vec<i8> = noise(dims.iter().product(), seed).iter().map(|v| (v * 127.0) as i8).collect();
    let scales: Vec<f32> = noise(dims[axis], seed + 1).iter().map(|v| 0.01 + 0.005 * v).collect();
    let w = n.graph.add_constant("w", Tensor::from_slice(dims, &values).unwrap());
    let scale = n.constant(&[dims[axis]], &scales);
    let zero = n.graph.add_constant("zero", Tensor::from_slice(&[dims[axis]], &vec![0i8; dims[axis]]).unwrap());
    (n.op_with("DequantizeLinear", &[w, scale, zero], &[("axis", int(axis as i64))]), scales)
}

/// A bias in units of the sums, as onnxruntime's quantiser writes it.
fn bias(n: &mut Net, x_scale: f32, scales: &[f32], seed: u64) -> ValueId {
    let values: Vec<i32> = noise(scales.len(), seed).iter().map(|v| (v * 3000.0) as i32).collect();
    let units: Vec<f32> = scales.iter().map(|s| s * x_scale).collect();
    let b = n.graph.add_constant("bias", Tensor::from_slice(&[values.len()], &values).unwrap());
    let scale = n.constant(&[values.len()], &units);
    n.op_with("DequantizeLinear", &[b, scale], &[("axis", int(0))])
}

/// Codes differ by one step in few places: a sum times `a b / y` in one product and in three operations of real numbers
/// may lie on either side of a half.
fn close(n: &Net, graph: &Graph, share: f32) {
    let [want, got] = n.both(graph);
    for (want, got) in want.iter().zip(&got) {
        assert_eq!((want.dtype(), want.dims()), (got.dtype(), got.dims()));
        let codes = |t: &Tensor| t.view().to_i64s().unwrap();
        let (want, got) = (codes(want), codes(got));
        let other = want.iter().zip(&got).filter(|(w, g)| w != g).count();
        assert!(want.iter().zip(&got).all(|(w, g)| w.abs_diff(*g) <= 1), "more than a step");
        assert!(other as f32 <= share * want.len() as f32, "{other} of {} differ", want.len());
        let spread = want.iter().collect::<BTreeSet<_>>().len();
        assert!(spread > 20, "{spread} different results say little");
    }
}

fn optimized(n: &Net, facts: &[Fact]) -> Graph {
    with_cx(|cx| optimize(n.graph.clone(), facts, true, cx).unwrap())
}

#[test]
fn an_inverted_residual_block() {
    let mut n = Net::new(13);
    let x = n.input("x", &[2, 8, 12, 11]);
    let x = qdq(&mut n, x, 0.03, 120);
    let conv = |n: &mut Net, x, x_scale: f32, dims: [usize; 4], groups: i64, seed: u64| {
        let (w, scales) = weights(n, &dims, 0, seed);
        let b = bias(n, x_scale, &scales, seed + 2);
        let pad = dims[2] as i64 / 2;
        n.op_with("Conv", &[x, w, b], &[("pads", ints(&[pad; 4])), ("group", int(groups))])
    };
    let y = conv(&mut n, x, 0.03, [24, 8, 1, 1], 1, 10);
    let y = n.op("Relu", &[y]);
    let y = qdq(&mut n, y, 0.05, 3);
    let y = conv(&mut n, y, 0.05, [24, 1, 3, 3], 24, 20);
    let (lo, hi) = (n.scalar(0.0), n.scalar(6.0));
    let y = n.op("Clip", &[y, lo, hi]);
    let y = qdq(&mut n, y, 6.0 / 255.0, 0);
    let y = conv(&mut n, y, 6.0 / 255.0, [8, 24, 1, 1], 1, 30);
    let y = qdq(&mut n, y, 0.04, 100);
    let y = n.op("Add", &[y, x]);
    let y = q(&mut n, y, 0.05, 110);
    n.output(y);
    let graph = optimized(&n, &[Fact::new(DType::F32, &[2, 8, 12, 11])]);
    let conv = "weblane.IntegerConv";
    assert_eq!(names(&graph), ["QuantizeLinear", "Transpose", conv, conv, conv, "Transpose"]);
    close(&n, &graph, 0.003);
    let Target::Quantized { lo: 3, .. } = graph.nodes[2].op.get::<IntegerProduct>().unwrap().target else {
        panic!("Relu is no bound");
    };
    // In the layout of the model too, as where a rank is not known.
    let graph = n.apply(run);
    assert_eq!(names(&graph), ["QuantizeLinear", conv, conv, conv]);
    close(&n, &graph, 0.003);
}

#[test]
fn a_classifier_behind_a_mean() {
    for last in [true, false] {
        let mut n = Net::new(13);
        let x = n.input("x", &[3, 16, 6, 5]);
        let y = qdq(&mut n, x, 0.03, 128);
        let y = n.op("GlobalAveragePool", &[y]);
        let y = qdq(&mut n, y, 0.005, 128);
        let y = n.op_with("Flatten", &[y], &[("axis", int(1))]);
        let y = qdq(&mut n, y, 0.005, 128);
        let (w, scales) = weights(&mut n, &[100, 16], 0, 5);
        let b = bias(&mut n, 0.005, &scales, 6);
        let y = n.op_with("Gemm", &[y, w, b], &[("transB", int(1))]);
        let y = if last { q(&mut n, y, 0.01, 128) } else { y };
        n.output(y);
        let graph = n.apply(run);
        let mean = "weblane.QuantizedGlobalAveragePool";
        assert_eq!(names(&graph), ["QuantizeLinear", mean, "Flatten", "weblane.IntegerMatMul"]);
        if last {
            close(&n, &graph, 0.001);
        } else {
            n.check(&graph);
        }
    }
}

#[test]
fn means_over_windows() {
    let mean = |name: &str, attrs: &[(&str, crate::onnx::AttributeValue)], want: &[&str]| {
        let mut n = Net::new(13);
        let x = n.input("x", &[2, 96, 9, 8]);
        let y = qdq(&mut n, x, 0.03, 128);
        let y = n.op_with(name, &[y], attrs);
        let y = n.op("Relu", &[y]);
        // Not a ratio of scales at which means lie on halves.
        let y = q(&mut n, y, 0.0023, 5);
        n.output(y);
        let graph = n.apply(run);
        assert_eq!(names(&graph)[1..], *want);
        close(&n, &graph, 0.001);
        let graph = optimized(&n, &[Fact::new(DType::F32, &[2, 96, 9, 8])]);
        close(&n, &graph, 0.001);
    };
    let kernel = || ("kernel_shape", ints(&[3, 2]));
    let pads = || ("pads", ints(&[1, 0, 1, 1]));
    let [sliding, global] = ["weblane.QuantizedAveragePool", "weblane.QuantizedGlobalAveragePool"];
    mean("AveragePool", &[kernel(), ("strides", ints(&[2, 1])), pads()], &[sliding]);
    mean("AveragePool", &[kernel(), pads(), ("count_include_pad", int(1))], &[sliding]);
    mean("GlobalAveragePool", &[], &[global]);
    mean("ReduceMean", &[("axes", ints(&[-1, 2]))], &[global]);
    mean("ReduceMean", &[("axes", ints(&[2, 3])), ("keepdims", int(0))], &[global, "Squeeze"]);
}

#[test]
fn transposed_convolutions_are_convolutions() {
    // Window, strides, padding, added elements, and whether DepthToSpace and Slice are needed.
    type Case = ([usize; 2], i64, [i64; 4], [i64; 2], [bool; 2]);
    let cases: [Case; 7] = [
        ([2, 2], 2, [0; 4], [0; 2], [true, false]),
        ([4, 4], 2, [1; 4], [0; 2], [true, true]),
        ([3, 3], 2, [1; 4], [1; 2], [true, true]),
        ([3, 2], 2, [0, 1, 1, 0], [1, 0], [true, true]),
        ([3, 3], 1, [1; 4], [0; 2], [false, false]),
        ([5, 4], 1, [0, 3, 1, 0], [0; 2], [false, false]),
        ([6, 5], 3, [4, 1, 2, 3], [0, 1], [true, true]),
    ];
    for ([kh, kw], stride, pads, added, [blocks, cut]) in cases {
        let mut n = Net::new(13);
        let x = n.input("x", &[2, 8, 6, 5]);
        let x = qdq(&mut n, x, 0.03, 120);
        let (w, scales) = weights(&mut n, &[8, 5, kh, kw], 1, 10);
        let b = bias(&mut n, 0.03, &scales, 12);
        let attrs = [("strides", ints(&[stride; 2])), ("pads", ints(&pads)), ("output_padding", ints(&added))];
        let y = n.op_with("ConvTranspose", &[x, w, b], &attrs);
        let y = n.op("Relu", &[y]);
        let y = q(&mut n, y, 0.05, 7);
        n.output(y);
        let graph = n.apply(run);
        let mut want = vec!["QuantizeLinear", "weblane.IntegerConv"];
        want.extend(blocks.then_some("DepthToSpace"));
        want.extend(cut.then_some("Slice"));
        assert_eq!(names(&graph), want);
        close(&n, &graph, 0.002);
        // Channels-last from the quantised input to the result.
        let graph = optimized(&n, &[Fact::new(DType::F32, &[2, 8, 6, 5])]);
        want.insert(1, "Transpose");
        want.push("Transpose");
        assert_eq!(names(&graph), want);
        close(&n, &graph, 0.002);
    }
    // Groups, of one channel as well; scales are for the channels of a group.
    for (groups, per_group, stride) in [(2, 5, 2), (8, 1, 2), (4, 3, 1)] {
        let mut n = Net::new(13);
        let x = n.input("x", &[2, 8, 6, 5]);
        let x = qdq(&mut n, x, 0.03, 120);
        let (w, scales) = weights(&mut n, &[8, per_group, 4, 4], 1, 10);
        let b = bias(&mut n, 0.03, &scales.repeat(groups), 12);
        let attrs = [("strides", ints(&[stride; 2])), ("pads", ints(&[1; 4])), ("group", int(groups as i64))];
        let y = n.op_with("ConvTranspose", &[x, w, b], &attrs);
        let y = q(&mut n, y, 0.05, 7);
        n.output(y);
        let graph = n.apply(run);
        let want = ["QuantizeLinear", "weblane.IntegerConv", "DepthToSpace", "Slice"];
        assert_eq!(names(&graph), want[..if stride == 1 { 2 } else { 4 }]);
        close(&n, &graph, 0.002);
        close(&n, &optimized(&n, &[Fact::new(DType::F32, &[2, 8, 6, 5])]), 0.002);
    }
    // A stride beyond the window leaves most of the result to the bias.
    let mut n = Net::new(13);
    let x = n.input("x", &[1, 8, 6, 5]);
    let x = qdq(&mut n, x, 0.03, 120);
    let (w, _) = weights(&mut n, &[8, 5, 1, 1], 1, 10);
    let y = n.op_with("ConvTranspose", &[x, w], &[("strides", ints(&[3, 3]))]);
    let y = q(&mut n, y, 0.05, 7);
    n.output(y);
    let graph = n.apply(run);
    assert!(names(&graph).contains(&"ConvTranspose".to_owned()));
}

#[test]
fn attention_between_quantised_tensors() {
    let mut n = Net::new(13);
    let [a, b] = ["a", "b"].map(|name| n.input(name, &[2, 3, 9, 16]));
    let (a, b) = (qdq(&mut n, a, 0.03, 120), qdq(&mut n, b, 0.04, 131));
    let t = n.op_with("Transpose", &[b], &[("perm", ints(&[0, 1, 3, 2]))]);
    let y = n.op("MatMul", &[a, t]);
    let y = qdq(&mut n, y, 0.2, 128);
    let y = n.op_with("Softmax", &[y], &[("axis", int(-1))]);
    let y = qdq(&mut n, y, 1.0 / 256.0, 0);
    let y = n.op("MatMul", &[y, b]);
    let y = q(&mut n, y, 0.03, 125);
    n.output(y);
    let graph = n.apply(run);
    let [q, product] = ["QuantizeLinear", "QLinearMatMul"];
    assert_eq!(names(&graph), [q, q, "Transpose", product, "weblane.QuantizedSoftmax", product]);
    close(&n, &graph, 0.003);
}

#[test]
fn parts_stay_bytes() {
    let mut n = Net::new(13);
    let x = n.input("x", &[2, 8, 6, 6]);
    let x = qdq(&mut n, x, 0.04, 100);
    let parts = n.nodes("Split", &[x], 2);
    if let Some(node) = n.graph.nodes.last_mut() {
        node.op = Split { axis: 1, sizes: None, parts: None }.into();
    }
    let a = n.op_with("MaxPool", &[parts[0]], &[("kernel_shape", ints(&[1, 1]))]);
    let y = n.op("Add", &[a, parts[1]]);
    let y = q(&mut n, y, 0.06, 110);
    n.output(y);
    let graph = n.apply(run);
    assert_eq!(names(&graph), ["QuantizeLinear", "Split", "MaxPool", "weblane.QuantizedAdd"]);
    close(&n, &graph, 0.001);
    // A part that is a result of the model stays real.
    n.output(parts[0]);
    let left = n.passed(run);
    assert_eq!(left[..3], ["QuantizeLinear", "Split", "DequantizeLinear"]);
}

#[test]
fn functions_become_tables() {
    let build = |f: &dyn Fn(&mut Net, ValueId) -> ValueId, want: &[&str]| {
        let mut n = Net::new(22);
        let x = n.input("x", &[3, 2, 100]);
        let x = q(&mut n, x, 0.04, 100);
        let y = dq(&mut n, x, 0.04, 100);
        let y = f(&mut n, y);
        let y = q(&mut n, y, 0.02, 90);
        n.output(y);
        assert_eq!(n.passed(run)[1..], *want);
    };
    let lookup: &[&str] = &["weblane.Lookup"];
    for name in ["Sigmoid", "HardSwish", "HardSigmoid", "LeakyRelu", "Tanh", "Gelu", "Relu", "Elu", "Exp"] {
        build(&|n, x| n.op(name, &[x]), lookup);
    }
    // SiLU with both factors quantised, the scale of the model in between.
    let silu = |n: &mut Net, x| {
        let s = n.op("Sigmoid", &[x]);
        let s = qdq(n, s, 1.0 / 256.0, 0);
        n.op("Mul", &[x, s])
    };
    build(&silu, lookup);
    build(&|_, x| x, lookup);
    let spelled = |n: &mut Net, x| {
        let (three, sixth) = (n.scalar(3.0), n.constant(&[1], &[1.0 / 6.0]));
        let y = n.op("Add", &[x, three]);
        let (lo, hi) = (n.scalar(0.0), n.scalar(6.0));
        let y = n.op("Clip", &[y, lo, hi]);
        let y = n.op("Mul", &[y, x]);
        n.op("Mul", &[sixth, y])
    };
    build(&spelled, lookup);
    // The same scale again is nothing; a constant of another rank adds an axis.
    let mut n = Net::new(13);
    let x = n.input("x", &[3, 100]);
    let x = q(&mut n, x, 0.04, 100);
    let y = dq(&mut n, x, 0.04, 100);
    let y = qdq(&mut n, y, 0.04, 100);
    let y = n.op("Softmax", &[y]);
    n.output(y);
    assert_eq!(n.optimized(), ["QuantizeLinear", "DequantizeLinear", "Softmax"]);
    let higher = |n: &mut Net, x| {
        let c = n.constant(&[1, 1, 1, 1], &[0.5]);
        n.op("Mul", &[x, c])
    };
    build(&higher, &["DequantizeLinear", "Mul", "QuantizeLinear"]);
}

#[test]
fn elements_move_as_bytes() {
    let mut n = Net::new(13);
    let x = n.input("x", &[2, 4, 6, 6]);
    let y = qdq(&mut n, x, 0.04, 100);
    let y = n.op_with("MaxPool", &[y], &[("kernel_shape", ints(&[3, 3])), ("pads", ints(&[1, 1, 1, 1]))]);
    let pads = n.i64s(&[0, 1, 0, 0, 0, 0, 0, 2]);
    let y = n.op("Pad", &[y, pads]);
    let other = qdq(&mut n, x, 0.03, 110);
    let y = qdq(&mut n, y, 0.04, 100);
    let shape = n.i64s(&[2, 5, 6, 8]);
    let y = n.op("Reshape", &[y, shape]);
    let (starts, ends, axes) = (n.i64s(&[1]), n.i64s(&[7]), n.i64s(&[3]));
    let y = n.op("Slice", &[y, starts, ends, axes]);
    let y = n.op_with("Concat", &[y, other], &[("axis", int(1))]);
    let y = qdq(&mut n, y, 0.04, 100);
    let scales = n.constant(&[4], &[1.0, 1.0, 2.0, 2.0]);
    let y = n.node("Resize", &[Some(y), None, Some(scales)], &[]);
    let y = q(&mut n, y, 0.04, 100);
    n.output(y);
    let mut left = n.passed(run);
    left.sort();
    let [q, lookup] = ["QuantizeLinear", "weblane.Lookup"];
    // The last QuantizeLinear does nothing but name the output.
    assert_eq!(left, ["Concat", "Identity", "MaxPool", "Pad", q, q, "Reshape", "Resize", "Slice", lookup]);
}

#[test]
fn interpolation_stays_bytes() {
    let half_pixel = ("coordinate_transformation_mode", string("half_pixel"));
    let corners = ("coordinate_transformation_mode", string("align_corners"));
    for (mode, scales, attribute, last) in [
        ("linear", [1.0, 1.0, 2.0, 2.0], half_pixel.clone(), "weblane.QuantizedResize"),
        ("linear", [1.0, 1.0, 1.5, 1.0], corners, "weblane.QuantizedResize"),
        ("cubic", [1.0, 1.0, 1.0, 0.5], half_pixel.clone(), "weblane.QuantizedResize"),
        // Channels as well, or axes that are no neighbours.
        ("linear", [1.0, 2.0, 3.0, 0.75], half_pixel.clone(), "weblane.QuantizedResize"),
        ("linear", [1.0, 0.5, 1.0, 3.0], half_pixel.clone(), "weblane.QuantizedResize"),
        ("nearest", [1.0, 1.0, 2.0, 2.0], half_pixel, "weblane.Lookup"),
    ] {
        let mut n = Net::new(13);
        let x = n.input("x", &[2, 4, 6, 5]);
        let y = qdq(&mut n, x, 0.04, 100);
        let scales = n.constant(&[4], &scales);
        let y = n.node("Resize", &[Some(y), None, Some(scales)], &[("mode", string(mode)), attribute]);
        let y = n.op("Relu", &[y]);
        // No simple ratio of the scales, with which many sums would be halves.
        let y = q(&mut n, y, 0.037_123, 20);
        n.output(y);
        let graph = n.apply(run);
        let left = names(&graph);
        assert_eq!(left.last().map(String::as_str), Some(last), "{mode}: {left:?}");
        assert!(!left.contains(&"DequantizeLinear".to_owned()), "{mode}: {left:?}");
        close(&n, &graph, 0.002);
    }
    // Behind a convolution it follows its order of axes.
    let mut n = Net::new(13);
    let x = n.input("x", &[1, 8, 6, 5]);
    let x = qdq(&mut n, x, 0.03, 120);
    let (w, _) = weights(&mut n, &[8, 8, 1, 1], 0, 10);
    let y = n.op("Conv", &[x, w]);
    let y = qdq(&mut n, y, 0.05, 100);
    let sizes = n.i64s(&[1, 8, 12, 9]);
    let y = n.node("Resize", &[Some(y), None, None, Some(sizes)], &[("mode", string("linear"))]);
    let y = q(&mut n, y, 0.047_123, 90);
    n.output(y);
    let graph = optimized(&n, &[Fact::new(DType::F32, &[1, 8, 6, 5])]);
    let want = ["QuantizeLinear", "Transpose", "weblane.IntegerConv", "weblane.QuantizedResize", "Transpose"];
    assert_eq!(names(&graph), want);
    close(&n, &graph, 0.002);
}

#[test]
fn sums_and_products_broadcast() {
    for (name, other) in [("Add", &["n", "4", "1", "1"][..]), ("Mul", &["n", "4", "1", "1"]), ("Mul", &["1"])] {
        let mut n = Net::new(13);
        let x = n.symbolic("x", &["n", "4", "9", "10"]);
        let other = n.symbolic("other", other);
        let x = qdq(&mut n, x, 0.04, 100);
        let other = qdq(&mut n, other, 0.03, 128);
        let y = n.op(name, &[x, other]);
        let y = n.op("Relu", &[y]);
        let y = q(&mut n, y, 0.05, 10);
        n.output(y);
        let graph = n.apply(run);
        assert_eq!(names(&graph)[2..], [format!("weblane.Quantized{name}")]);
        close(&n, &graph, 0.001);
    }
}

#[test]
fn products_of_the_standard_with_constants() {
    let mut n = Net::new(13);
    let x = n.input("x", &[1, 3, 9, 8]);
    let x = q(&mut n, x, 0.04, 100);
    let w: Vec<i8> = noise(4 * 3 * 9, 3).iter().map(|v| (v * 127.0) as i8).collect();
    let w = n.graph.add_constant("w", Tensor::from_slice(&[4, 3, 3, 3], &w).unwrap());
    let ws = n.constant(&[4], &[0.01, 0.02, 0.03, 0.015]);
    let wz = n.graph.add_constant("zero", Tensor::from_slice(&[4], &[1i8, 2, -3, 4]).unwrap());
    let (xs, ys) = (n.scalar(0.04), n.scalar(0.1));
    let (xz, yz) = (bytes(&mut n, &[], &[100]), bytes(&mut n, &[], &[128]));
    let b = n.graph.add_constant("bias", Tensor::from_slice(&[4], &[100i32, -200, 300, 50]).unwrap());
    let pads = [("pads", ints(&[1, 1, 1, 1]))];
    let y = n.op_with("QLinearConv", &[x, xs, xz, w, ws, wz, ys, yz, b], &pads);
    let sums = n.op_with("ConvInteger", &[x, w, xz], &pads);
    let m: Vec<u8> = noise(8 * 5, 4).iter().map(|v| (v * 100.0 + 128.0) as u8).collect();
    let m = bytes(&mut n, &[8, 5], &m);
    let (ms, mz) = (n.scalar(0.02), bytes(&mut n, &[], &[120]));
    let z = n.op("QLinearMatMul", &[x, xs, xz, m, ms, mz, ys, yz]);
    let more = n.op("MatMulInteger", &[x, m, xz, mz]);
    for id in [y, sums, z, more] {
        n.output(id);
    }
    // The same arithmetic: the same integers.
    let mut left = n.optimized();
    left.retain(|name| name.starts_with("weblane"));
    left.sort();
    let [conv, product] = ["weblane.IntegerConv", "weblane.IntegerMatMul"];
    assert_eq!(left, [conv, conv, product, product]);
}

#[test]
fn products_quantised_at_run_time() {
    for columns in [true, false] {
        let mut n = Net::new(14);
        let x = n.symbolic("x", &["batch", "tokens", "16"]);
        let r = n.symbolic("r", &["batch", "tokens", "12"]);
        let quantized = n.nodes("DynamicQuantizeLinear", &[x], 3);
        let mut dense = |x: &[ValueId], seed: u64| {
            let w: Vec<i8> = noise(16 * 12, seed).iter().map(|v| (v * 127.0) as i8).collect();
            let w = n.graph.add_constant("w", Tensor::from_slice(&[16, 12], &w).unwrap());
            let count = if columns { 12 } else { 1 };
            let scales: Vec<f32> = noise(count, seed).iter().map(|v| 0.01 + 0.005 * v).collect();
            let dims: &[usize] = if columns { &[12] } else { &[] };
            let ws = n.constant(dims, &scales);
            let wz = n.graph.add_constant("zero", Tensor::from_slice(dims, &vec![0i8; count]).unwrap());
            let y = n.op("MatMulInteger", &[x[0], w, x[2], wz]);
            let y = n.op_with("Cast", &[y], &[("to", int(1))]);
            let s = n.op("Mul", &[x[1], ws]);
            let y = n.op("Mul", &[y, s]);
            let b = n.weights(&[12]);
            n.op("Add", &[b, y])
        };
        let (a, b) = (dense(&quantized, 1), dense(&quantized, 2));
        let a = n.op("Relu", &[a]);
        let b = n.op("Add", &[b, r]);
        n.output(a);
        n.output(b);
        let product = "weblane.IntegerMatMul";
        assert_eq!(n.optimized(), ["DynamicQuantizeLinear", product, product]);
    }
}

#[test]
fn convolutions_quantised_at_run_time() {
    let mut n = Net::new(14);
    let mut y = n.input("x", &[2, 3, 7, 6]);
    for channels in [3, 4] {
        let quantized = n.nodes("DynamicQuantizeLinear", &[y], 3);
        let w: Vec<u8> = noise(4 * channels * 9, 5).iter().map(|v| (v * 100.0 + 128.0) as u8).collect();
        let (w, zero, scale) = (bytes(&mut n, &[4, channels, 3, 3], &w), bytes(&mut n, &[], &[128]), n.scalar(0.02));
        y = n.op("ConvInteger", &[quantized[0], w, quantized[2], zero]);
        y = n.op_with("Cast", &[y], &[("to", int(1))]);
        let s = n.op("Mul", &[quantized[1], scale]);
        y = n.op("Mul", &[y, s]);
        let b = n.weights(&[4]);
        let shape = n.i64s(&[1, -1, 1, 1]);
        let b = n.op("Reshape", &[b, shape]);
        y = n.op("Add", &[y, b]);
        y = n.op("Relu", &[y]);
    }
    n.output(y);
    let (q, conv) = ("DynamicQuantizeLinear", "weblane.IntegerConv");
    assert_eq!(n.optimized(), [q, "Transpose", conv, q, conv, "Transpose"]);
}

#[test]
fn stays_real_where_integers_do_not_fit() {
    // Scales along the rows of a product, weights that only one side quantises, sums that others read too.
    let build = |axis: usize, quantise: bool, shared: bool| {
        let mut n = Net::new(13);
        let x = n.input("x", &[7, 12]);
        let x = if quantise { qdq(&mut n, x, 0.04, 100) } else { x };
        let (w, _) = weights(&mut n, &[12, 12], axis, 3);
        let y = n.op("MatMul", &[x, w]);
        if shared {
            n.output(y);
        }
        let y = n.op_with("LeakyRelu", &[y], &[("alpha", float(0.1))]);
        let y = q(&mut n, y, 0.1, 128);
        n.output(y);
        let graph = n.apply(run);
        names(&graph).contains(&"weblane.IntegerMatMul".to_owned())
    };
    assert!(build(1, true, false));
    assert!(build(1, true, true), "real results are shared");
    assert!(!build(0, true, false));
    assert!(!build(1, false, false));
}

/// As onnxruntime's quantiser writes networks in its format of operators. Halves are many where scales are equal, and go
/// where the named operators send them: the sums there are the same to the last one.
#[test]
fn operators_of_onnxruntime_become_the_engines() {
    let mut n = Net::new(13);
    let x = n.input("x", &[2, 8, 6, 5]);
    let x = q(&mut n, x, 0.03, 121);
    let one = |n: &mut Net, scale: f32, zero: u8| [Some(n.scalar(scale)), Some(bytes(n, &[], &[zero]))];
    let convolution = |n: &mut Net, x, dims: [usize; 4], seed: u64| {
        let values: Vec<i8> = noise(dims.iter().product(), seed).iter().map(|v| (v * 127.0) as i8).collect();
        let w = n.graph.add_constant("w", Tensor::from_slice(&dims, &values).unwrap());
        let w_zero = n.graph.add_constant("zero", Tensor::from_slice(&[], &[0i8]).unwrap());
        let ([a, a_zero], [y, y_zero]) = (one(n, 0.03, 121), one(n, 0.06, 117));
        let w_scale = Some(n.scalar(0.01));
        n.node(
            "QLinearConv",
            &[Some(x), a, a_zero, Some(w), w_scale, Some(w_zero), y, y_zero],
            &[("pads", ints(&[1; 4]))],
        )
    };
    let sum = |n: &mut Net, name: &str, a, b, y: [Option<ValueId>; 2]| {
        let ([s, zero], [t, other]) = (one(n, 0.03, 121), one(n, 0.06, 117));
        n.contrib(name, &[Some(a), s, zero, Some(b), t, other, y[0], y[1]], &[])
    };
    let y = convolution(&mut n, x, [8, 8, 3, 3], 1);
    let halves = one(&mut n, 0.06, 113);
    let y = sum(&mut n, "QLinearAdd", x, y, halves);
    let (from, to) = (one(&mut n, 0.06, 113), one(&mut n, 1.0 / 255.0, 3));
    let gate = n.contrib("QLinearSigmoid", &[Some(y), from[0], from[1], to[0], to[1]], &[]);
    let (s, t, u) = (one(&mut n, 0.06, 113), one(&mut n, 1.0 / 255.0, 3), one(&mut n, 0.03, 121));
    let y = n.contrib("QLinearMul", &[Some(y), s[0], s[1], Some(gate), t[0], t[1], u[0], u[1]], &[]);
    let (s, t, u) = (one(&mut n, 0.05, 117), one(&mut n, 0.03, 121), one(&mut n, 0.05, 117));
    let parts = [s[0], s[1], Some(y), t[0], t[1], Some(x), u[0], u[1]];
    let y = n.contrib("QLinearConcat", &parts, &[("axis", int(1))]);
    let (s, t) = (one(&mut n, 0.05, 117), one(&mut n, 0.025, 117));
    let window = [("kernel_shape", ints(&[2, 2]))];
    let y = n.contrib("QLinearAveragePool", &[Some(y), s[0], s[1], t[0], t[1]], &window);
    n.output(y);
    let mean = n.contrib("QLinearGlobalAveragePool", &[Some(y), s[0], s[1], t[0], t[1]], &[]);
    let mean = n.op_with("Flatten", &[mean], &[("axis", int(1))]);
    let values: Vec<u8> = noise(16 * 30, 7).iter().map(|v| (128.0 + 127.0 * v) as u8).collect();
    let w = bytes(&mut n, &[30, 16], &values);
    let c: Vec<i32> = (0..30).map(|i| i * 400 - 6000).collect();
    let c = n.graph.add_constant("c", Tensor::from_slice(&[30], &c).unwrap());
    let (s, t, u) = (one(&mut n, 0.025, 117), one(&mut n, 0.02, 128), one(&mut n, 0.4, 100));
    let operands = [Some(mean), s[0], s[1], Some(w), t[0], t[1], Some(c), u[0], u[1]];
    let y = n.contrib("QGemm", &operands, &[("transB", int(1))]);
    n.output(y);
    let graph = optimized(&n, &[Fact::new(DType::F32, &[2, 8, 6, 5])]);
    assert_eq!(
        names(&graph),
        [
            "QuantizeLinear",
            "Transpose",
            "weblane.IntegerConv",
            "weblane.Lookup",
            "weblane.QuantizedMul",
            "weblane.Lookup",
            "Concat",
            "com.microsoft.QLinearAveragePool",
            "weblane.QuantizedGlobalAveragePool",
            "Reshape",
            "weblane.IntegerMatMul",
            "Transpose",
        ]
    );
    close(&n, &graph, 0.0);
}
