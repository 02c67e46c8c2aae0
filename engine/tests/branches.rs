//! Branches that a flag among the inputs chooses: every value of the flag gives the numbers of its branch, whatever ran
//! before, with the optimiser on and off, and also when what looked like a flag changes with every run.

use weblane_engine::onnx::{
    Attribute, AttributeValue, Dim, Graph, Model, Node, OpsetId, TensorProto, TypeProto, ValueInfo,
};
use weblane_engine::session::Optimize;
use weblane_engine::{DType, Options, Session, Tensor};

fn node(op_type: &str, inputs: &[&str], output: &str) -> Node {
    Node {
        op_type: op_type.into(),
        inputs: inputs.iter().map(|s| (*s).into()).collect(),
        outputs: vec![output.into()],
        ..Node::default()
    }
}

fn value(name: &str, dtype: DType, dims: &[Dim]) -> ValueInfo {
    let ty = TypeProto::Tensor { elem_type: dtype as i32, shape: Some(dims.to_vec()) };
    ValueInfo { name: name.into(), ty: Some(ty) }
}

/// `x w` for the weights of a branch, then an operation.
fn branch(op: &str, weight: f32) -> AttributeValue {
    let w = Tensor::from_slice(&[2, 2], &[weight, 0.5, -1.0, weight]).unwrap();
    let graph = Graph {
        name: op.into(),
        nodes: vec![node("MatMul", &["x", "w"], "product"), node(op, &["product"], "result")],
        initializers: vec![TensorProto::new("w", &w).unwrap()],
        outputs: vec![value("result", DType::F32, &[Dim::Param("rows".into()), Dim::Known(2)])],
        ..Graph::default()
    };
    AttributeValue::Graph(Box::new(graph))
}

/// `if flag < 10 { relu(x a) } else { neg(x b) }`
fn session(optimize: Optimize) -> Session {
    let mut choice = node("If", &["condition"], "y");
    for (name, value) in [("then_branch", branch("Relu", 2.0)), ("else_branch", branch("Neg", 3.0))] {
        choice.attributes.push(Attribute { name: name.into(), value });
    }
    let ten = Tensor::scalar(10i64).unwrap();
    let rows = [Dim::Param("rows".into()), Dim::Known(2)];
    let graph = Graph {
        name: "choice".into(),
        nodes: vec![node("Less", &["flag", "ten"], "condition"), choice],
        initializers: vec![TensorProto::new("ten", &ten).unwrap()],
        inputs: vec![value("x", DType::F32, &rows), value("flag", DType::I64, &[])],
        outputs: vec![value("y", DType::F32, &rows)],
        ..Graph::default()
    };
    let opset = OpsetId { domain: String::new(), version: 17 };
    let model = Model { ir_version: 8, opset_imports: vec![opset], graph, ..Model::default() };
    Session::from_bytes(&model.to_bytes(), Options { optimize, threads: 1, ..Options::default() }).unwrap()
}

fn expected(x: &[f32], flag: i64) -> Vec<f32> {
    let w = if flag < 10 { 2.0 } else { 3.0 };
    let product = x.chunks(2).flat_map(|r| [r[0] * w - r[1], r[0] * 0.5 + r[1] * w]);
    if flag < 10 { product.map(|v| v.max(0.0)).collect() } else { product.map(|v| -v).collect() }
}

#[test]
fn each_flag_runs_its_branch() {
    for optimize in [Optimize::All, Optimize::None] {
        let mut session = session(optimize);
        let flags = [3i64, 30, 3, 4, 5, 6, 7, 8, 30, 31, 32, 33, 34, 35, 9, 3];
        for (i, flag) in flags.into_iter().enumerate() {
            for rows in [1, 3] {
                let x: Vec<f32> = (0..rows * 2).map(|k| (k + i) as f32 - 3.0).collect();
                let feeds = [Tensor::from_slice(&[rows, 2], &x).unwrap(), Tensor::scalar(flag).unwrap()];
                let y = session.run(&[("x", feeds[0].view()), ("flag", feeds[1].view())]).unwrap();
                assert_eq!(y[0].as_slice::<f32>().unwrap(), expected(&x, flag), "run {i}, flag {flag}, {rows} rows");
            }
        }
    }
}
