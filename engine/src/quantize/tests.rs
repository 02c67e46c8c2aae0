//! Whole models, float and quantised.

use super::testing::{Net, noise, ops, quantised, run, sample, value};
use super::{Method, Mode, QuantizeOptions, Sample, Stage, quantize};
use crate::error::ErrorCode;
use crate::onnx::{AttributeValue, Graph, Model};
use crate::session::Options;
use crate::tensor::{DType, Tensor};

fn of(mode: Mode) -> QuantizeOptions {
    QuantizeOptions { mode, ..QuantizeOptions::default() }
}

fn int(v: i64) -> AttributeValue {
    AttributeValue::Int(v)
}

fn ints(v: &[i64]) -> AttributeValue {
    AttributeValue::Ints(v.to_vec())
}

/// Two products of the same value, a Gemm with everything, a residual sum.
fn products() -> Model {
    Net::new(13)
        .input("x", &[-1, 40])
        .weights("a", &[40, 24], &noise(960, 1))
        .weights("b", &[40, 24], &noise(960, 2))
        .weights("c", &[8, 24], &noise(192, 3))
        .weights("bias", &[8], &noise(8, 4))
        .node("MatMul", &["x", "a"], "p", &[])
        .node("MatMul", &["x", "b"], "q", &[])
        .node("Add", &["p", "q"], "s", &[])
        .node(
            "Gemm",
            &["s", "c", "bias"],
            "y",
            &[("transB", int(1)), ("alpha", AttributeValue::Float(0.5)), ("beta", AttributeValue::Float(2.0))],
        )
        .output("y", &[-1, 8])
        .model
}

fn convolutions(opset: i64) -> Model {
    let net = Net::new(opset)
        .input("x", &[1, 3, 12, 12])
        .weights("w1", &[8, 3, 3, 3], &noise(216, 1))
        .weights("b1", &[8], &noise(8, 2))
        .weights("gain", &[8], &[0.5, 1.0, 1.5, 2.0, 0.5, 1.0, 1.5, 2.0])
        .weights("shift", &[8], &noise(8, 3))
        .weights("mean", &[8], &noise(8, 4))
        .weights("variance", &[8], &[1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0])
        .weights("w2", &[8, 1, 3, 3], &noise(72, 5))
        .weights("w3", &[10, 8], &noise(80, 6))
        .weights("b3", &[10], &noise(10, 7))
        .node("Conv", &["x", "w1", "b1"], "c1", &[("pads", ints(&[1, 1, 1, 1]))])
        .node("BatchNormalization", &["c1", "gain", "shift", "mean", "variance"], "n1", &[])
        .node("Relu", &["n1"], "r1", &[])
        .node("MaxPool", &["r1"], "m1", &[("kernel_shape", ints(&[2, 2])), ("strides", ints(&[2, 2]))])
        .node("Conv", &["m1", "w2"], "c2", &[("group", int(8)), ("pads", ints(&[1, 1, 1, 1]))])
        .node("Add", &["c2", "m1"], "s", &[])
        .node("GlobalAveragePool", &["s"], "g", &[])
        .node("Flatten", &["g"], "f", &[])
        .node("Gemm", &["f", "w3", "b3"], "y", &[("transB", int(1))]);
    net.output("y", &[1, 10]).model
}

fn samples(dims: &[usize], name: &str, count: u64) -> Vec<Sample> {
    (0..count).map(|i| sample(name, dims, 100 + i)).collect()
}

fn cosine(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.as_slice::<f32>().unwrap(), b.as_slice::<f32>().unwrap());
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
fn a_model_is_written_back_whole() {
    let mut model = products();
    model.metadata_props.push(("key".into(), "value".into()));
    assert_eq!(Model::parse(&model.to_bytes()).unwrap(), model);
    assert_eq!(model.byte_len(), model.to_bytes().len());
}

#[test]
fn dynamic_products() {
    let model = products();
    let (q, report) = quantised(&model, of(Mode::Dynamic), &samples(&[5, 40], "x", 3)).unwrap();
    let count = |op: &str| ops(&q).iter().filter(|o| **o == op).count();
    // One for x, one for s.
    assert_eq!((count("DynamicQuantizeLinear"), count("MatMulInteger"), count("MatMul"), count("Gemm")), (2, 3, 0, 0));
    let feed = sample("x", &[7, 40], 9);
    let (want, got) = (run(&model, &feed), run(&q, &feed));
    assert!(cosine(&want[0], &got[0]) > 0.999, "{}", cosine(&want[0], &got[0]));
    assert_eq!((report.nodes.len(), report.skipped.len(), report.outputs.len()), (3, 0, 1));
    for n in &report.nodes {
        // 8 bits of uniform weights: about 6.02 * 7 + 4.8 dB of the largest.
        assert!(n.sqnr_db.unwrap() > 40.0, "{n:?}");
    }
    let output = &report.outputs[0];
    assert_eq!(output.samples, 3);
    assert!(output.cosine > 0.999 && output.min_cosine <= output.cosine && output.max_error > 0.0, "{output:?}");
    assert_eq!((report.bytes_before, report.bytes_after), (model.byte_len(), q.to_bytes().len()));
}

#[test]
fn reports_are_what_the_outputs_say() {
    let model = products();
    let given = samples(&[2, 40], "x", 2);
    let (q, report) = quantised(&model, of(Mode::Dynamic), &given).unwrap();
    let (mut sum, mut worst, mut same) = (0.0, 0f64, 0);
    for s in &given {
        let (want, got) = (run(&model, s), run(&q, s));
        sum += cosine(&want[0], &got[0]);
        let (want, got) = (want[0].as_slice::<f32>().unwrap(), got[0].as_slice::<f32>().unwrap());
        worst = want.iter().zip(got).map(|(a, b)| f64::from((a - b).abs())).fold(worst, f64::max);
        let best = |row: &[f32]| (0..8).max_by(|&i, &j| row[i].total_cmp(&row[j])).unwrap();
        same += want.chunks(8).zip(got.chunks(8)).filter(|(a, b)| best(a) == best(b)).count();
    }
    let output = &report.outputs[0];
    assert!((output.cosine - sum / 2.0).abs() < 1e-6 && (output.max_error - worst).abs() < 1e-5, "{output:?}");
    assert_eq!(output.top1, Some(same as f64 / 4.0));
}

#[test]
fn skipped_nodes_stay() {
    let options = QuantizeOptions { skip_nodes: vec!["node_?".into()], ..of(Mode::Dynamic) };
    let (q, report) = quantised(&products(), options, &[]).unwrap();
    assert_eq!(ops(&q), ["MatMul", "MatMul", "Add", "Gemm"]);
    assert_eq!(report.skipped.len(), 3);
    let options = QuantizeOptions { skip_ops: vec!["Gemm".into()], ..of(Mode::Dynamic) };
    let (q, _) = quantised(&products(), options, &[]).unwrap();
    assert!(ops(&q).contains(&"Gemm") && !ops(&q).contains(&"MatMul"));
    let options = QuantizeOptions { skip_nodes: vec!["nobody".into()], ..of(Mode::Dynamic) };
    assert_eq!(quantised(&products(), options, &[]).unwrap_err().code, ErrorCode::InvalidOption);
}

#[test]
fn embeddings_become_bytes() {
    let model = Net::new(13)
        .typed_input("ids", DType::I64, &[-1])
        .weights("table", &[64, 32], &noise(2048, 1))
        .node("Gather", &["table", "ids"], "y", &[])
        .output("y", &[-1, 32])
        .model;
    let (q, report) = quantised(&model, of(Mode::Dynamic), &[]).unwrap();
    assert_eq!(ops(&q), ["Gather", "DequantizeLinear"]);
    let feed = vec![("ids".to_owned(), Tensor::from_slice(&[3], &[0i64, 63, 7]).unwrap())];
    assert!(cosine(&run(&model, &feed)[0], &run(&q, &feed)[0]) > 0.9999);
    assert_eq!((report.nodes[0].bytes_before, report.nodes[0].bytes_after), (8192, 2048 + 5 * 32));
    let options = QuantizeOptions { embeddings: false, ..of(Mode::Dynamic) };
    assert_eq!(ops(&quantised(&model, options, &[]).unwrap().0), ["Gather"]);
}

#[test]
fn static_convolutions() {
    for (method, opset) in [(Method::MinMax, 13), (Method::Percentile, 13), (Method::Entropy, 13), (Method::MinMax, 9)]
    {
        for signed_activations in [false, true] {
            let model = convolutions(opset);
            let options = QuantizeOptions { method, signed_activations, ..of(Mode::Static) };
            let (q, report) = quantised(&model, options, &samples(&[1, 3, 12, 12], "x", 8)).unwrap();
            // BatchNormalization is in the weights, and the range of r1 cuts off what Relu does.
            let all = ops(&q);
            assert!(!all.contains(&"BatchNormalization") && !all.contains(&"Relu"), "{all:?}");
            assert_eq!(q.opset(""), Some(13));
            let feed = sample("x", &[1, 3, 12, 12], 9);
            let similar = cosine(&run(&model, &feed)[0], &run(&q, &feed)[0]);
            assert!(similar > 0.99, "{method:?} {similar}");
            assert!(report.outputs[0].cosine > 0.99, "{:?}", report.outputs);
            let conv = report.nodes.iter().find(|n| n.op == "Conv").unwrap();
            assert!(conv.sqnr_db.unwrap() > 40.0 && conv.output_sqnr_db.unwrap() > 20.0, "{conv:?}");
            let weights = q.graph.initializers.iter().find(|t| t.name.ends_with("b3_quantized")).unwrap();
            assert_eq!(weights.dtype, DType::I32);
        }
    }
    let e = quantised(&convolutions(13), of(Mode::Static), &[]).unwrap_err();
    assert_eq!(e.code, ErrorCode::MissingInput);
}

#[test]
fn pools_keep_the_scale_and_outputs_their_name() {
    let (q, _) = quantised(&convolutions(13), of(Mode::Static), &samples(&[1, 3, 12, 12], "x", 2)).unwrap();
    let q_of = |name: &str| q.graph.nodes.iter().find(|n| n.op_type == "QuantizeLinear" && n.inputs[0] == name);
    assert_eq!(q_of("m1").unwrap().inputs[1..], q_of("r1").unwrap().inputs[1..]);
    assert_eq!(q.graph.outputs[0].name, "y");
    assert_eq!(q.graph.nodes.last().unwrap().outputs, ["y"]);
}

#[test]
fn older_opsets_are_raised_with_the_same_result() {
    let model = Net::new(7)
        .input("x", &[2, 3, 2, 2])
        .node("Softmax", &["x"], "s", &[])
        .node("Clip", &["s"], "c", &[("min", AttributeValue::Float(0.1)), ("max", AttributeValue::Float(0.2))])
        .node("Slice", &["c"], "l", &[("starts", ints(&[1])), ("ends", ints(&[3])), ("axes", ints(&[1]))])
        .node("Unsqueeze", &["l"], "y", &[("axes", ints(&[0]))])
        .output("y", &[1, 2, 2, 2, 2])
        .model;
    let mut raised = model.clone();
    super::opset::raise(&mut raised, 13).unwrap();
    let feed = sample("x", &[2, 3, 2, 2], 1);
    let (want, got) = (run(&model, &feed), run(&raised, &feed));
    assert_eq!(want[0].dims(), got[0].dims());
    assert_eq!(want[0].as_slice::<f32>().unwrap(), got[0].as_slice::<f32>().unwrap());
    let odd = Net::new(9).input("x", &[1]).node("Odd", &["x"], "y", &[]).output("y", &[1]).model;
    let e = quantised(&odd, of(Mode::Dynamic), &[]).unwrap_err();
    assert!(e.code == ErrorCode::UnsupportedOperator && e.op.as_deref() == Some("Odd"), "{e}");
}

#[test]
fn weight_only_layouts_hold_the_weights() {
    for (mode, bits) in [(Mode::Int4, 4), (Mode::Int8Weights, 8)] {
        for symmetric in [true, false] {
            let model = products();
            let options = QuantizeOptions { symmetric, block_size: 16, ..of(mode) };
            let (q, report) = quantised(&model, options, &[]).unwrap();
            assert_eq!(ops(&q).iter().filter(|o| **o == "MatMulNBits").count(), 3);
            let node = q.graph.nodes.iter().find(|n| n.op_type == "MatMulNBits").unwrap();
            let bytes = |i: usize| {
                let t = q.graph.initializers.iter().find(|t| t.name == node.inputs[i]).unwrap();
                (t.clone().into_tensor().unwrap(), t.dims.clone())
            };
            let ((b, dims), (scales, _)) = (bytes(1), bytes(2));
            // k = 40 are three blocks of 16.
            assert_eq!(dims, [24, 3, 16 * bits / 8]);
            let w = noise(960, 1);
            let mut worst = 0f32;
            for k in 0..40 {
                for n in 0..24 {
                    let (block, at) = (n * 3 + k / 16, k % 16);
                    let pick = |t: &Tensor, base: usize, i: usize| match bits {
                        4 => t.bytes()[base + i / 2] >> (4 * (i % 2)) & 15,
                        _ => t.bytes()[base + i],
                    };
                    let zero =
                        if symmetric { 1 << (bits - 1) } else { pick(&bytes(3).0, n * (3 * bits).div_ceil(8), k / 16) };
                    let q = pick(&b, block * 16 * bits / 8, at);
                    let real = (f32::from(q) - f32::from(zero)) * scales.as_slice::<f32>().unwrap()[block];
                    worst = worst.max((real - w[k * 24 + n]).abs());
                }
            }
            assert!(worst < if bits == 4 { 0.25 } else { 0.01 }, "{worst}");
            assert!(report.nodes[0].sqnr_db.unwrap() > if bits == 4 { 18.0 } else { 40.0 }, "{:?}", report.nodes[0]);
        }
    }
}

#[test]
fn half_precision_and_back() {
    let model = convolutions(13);
    let feed = sample("x", &[1, 3, 12, 12], 9);
    let want = run(&model, &feed);
    let (half, report) = quantised(&model, of(Mode::Float16), &[feed.clone()]).unwrap();
    assert!(half.graph.initializers.iter().all(|t| t.dtype != DType::F32));
    assert!(half.byte_len() * 10 < model.byte_len() * 8);
    assert!(cosine(&want[0], &run(&half, &feed)[0]) > 0.9999);
    assert!(report.outputs[0].cosine > 0.9999);

    let options = QuantizeOptions { keep_io: false, skip_ops: vec!["Gemm".into()], ..of(Mode::Float16) };
    let (half, _) = quantised(&model, options, &[feed.clone()]).unwrap();
    let (full, _) = quantised(&half, of(Mode::Float32), &[]).unwrap();
    assert!(full.graph.initializers.iter().all(|t| t.dtype != DType::F16));
    assert!(cosine(&want[0], &run(&full, &feed)[0]) > 0.9999);
}

#[test]
fn half_precision_around_a_body() {
    let body = |name: &str, op: &str| {
        let mut net = Net::new(13).node(op, &["t", "w"], name, &[]);
        net.model.graph.outputs.push(value(name, DType::F32, &[-1, 4]));
        AttributeValue::Graph(Box::new(Graph { name: name.into(), ..net.model.graph }))
    };
    let model = Net::new(13)
        .input("x", &[-1, 4])
        .typed_input("c", DType::Bool, &[])
        .weights("w", &[4, 4], &noise(16, 1))
        .node("MatMul", &["x", "w"], "t", &[])
        .node("If", &["c"], "i", &[("then_branch", body("u", "MatMul")), ("else_branch", body("v", "Add"))])
        .node("Mul", &["i", "t"], "y", &[])
        .output("y", &[-1, 4])
        .model;
    for truth in [true, false] {
        let mut feed = sample("x", &[4, 4], 3);
        feed.push(("c".into(), Tensor::from_bools(&[], &[truth]).unwrap()));
        let want = run(&model, &feed);
        for mode in [Mode::Float16, Mode::Dynamic] {
            let (q, report) = quantised(&model, of(mode), &[feed.clone()]).unwrap();
            assert!(cosine(&want[0], &run(&q, &feed)[0]) > 0.99);
            assert!(report.outputs[0].cosine > 0.99);
        }
    }
}

#[test]
fn constants_of_nodes_and_transposes_count_as_weights() {
    let w = super::edit::constant("", &[8, 16], &noise(128, 1)).unwrap();
    let model = Net::new(13)
        .input("x", &[-1, 16])
        .node("Constant", &[], "w", &[("value", AttributeValue::Tensor(w))])
        .node("Transpose", &["w"], "wt", &[("perm", ints(&[1, 0]))])
        .node("MatMul", &["x", "wt"], "y", &[])
        .output("y", &[-1, 8])
        .model;
    let (q, _) = quantised(&model, of(Mode::Dynamic), &[]).unwrap();
    assert_eq!(ops(&q), ["DynamicQuantizeLinear", "MatMulInteger", "Cast", "Mul", "Mul"]);
    let feed = sample("x", &[3, 16], 2);
    assert!(cosine(&run(&model, &feed)[0], &run(&q, &feed)[0]) > 0.999);
}

#[test]
fn stopping_and_wrong_options() {
    let mut seen = Vec::new();
    let mut stop = |p: super::Progress| {
        seen.push((p.stage, p.done));
        p.done < 2
    };
    let e = quantize(products(), of(Mode::Dynamic), Vec::new(), Options::default(), &mut stop).unwrap_err();
    assert_eq!(e.code, ErrorCode::Aborted);
    assert_eq!(seen, [(Stage::Quantize, 0), (Stage::Quantize, 1), (Stage::Quantize, 2)]);
    for options in [
        QuantizeOptions { block_size: 24, ..of(Mode::Int4) },
        QuantizeOptions { percentile: 0.0, ..of(Mode::Static) },
        QuantizeOptions { accuracy_level: 9, ..of(Mode::Int4) },
    ] {
        assert_eq!(quantised(&products(), options, &[]).unwrap_err().code, ErrorCode::InvalidOption);
    }
}

#[test]
fn weights_that_are_no_numbers_are_named() {
    let mut values = noise(32, 1);
    values[5] = f32::NAN;
    let model = Net::new(13)
        .input("x", &[-1, 8])
        .weights("w", &[8, 4], &values)
        .node("MatMul", &["x", "w"], "y", &[])
        .output("y", &[-1, 4])
        .model;
    for mode in [Mode::Dynamic, Mode::Int4] {
        let e = quantised(&model, of(mode), &[]).unwrap_err();
        assert_eq!((e.code, e.node.as_deref()), (ErrorCode::InvalidModel, Some("node_y")), "{e}");
        assert!(e.message.contains("\"w\" hold NaN"), "{e}");
    }
}

#[test]
fn damaged_models_are_errors_or_stay() {
    // What a file may say and no exporter would: no results, no operands, weights without elements.
    let model = convolutions(13);
    let given = samples(&[1, 3, 12, 12], "x", 1);
    for i in 0..model.graph.nodes.len() {
        for what in 0..4 {
            let mut bad = model.clone();
            let node = &mut bad.graph.nodes[i];
            match what {
                0 => node.outputs.clear(),
                1 => node.inputs.clear(),
                2 => node.inputs.truncate(1),
                _ => node.inputs[0] = "nobody".into(),
            }
            for mode in [Mode::Dynamic, Mode::Static, Mode::Int4, Mode::Float16] {
                let _ = quantised(&bad, of(mode), if mode == Mode::Static { &given } else { &[] });
            }
        }
    }
    for dims in [[0, 1 << 40], [1 << 40, 0]] {
        let model = Net::new(13)
            .input("x", &[-1, 8])
            .weights("w", &dims, &[])
            .node("Transpose", &["w"], "t", &[])
            .node("MatMul", &["x", "w"], "y", &[])
            .node("MatMul", &["x", "t"], "z", &[])
            .output("y", &[-1, 8])
            .output("z", &[-1, 8])
            .model;
        for mode in [Mode::Dynamic, Mode::Static, Mode::Int4, Mode::Float16] {
            let given = samples(&[2, 8], "x", 1);
            let _ = quantised(&model, of(mode), if mode == Mode::Static { &given } else { &[] });
        }
    }
}
