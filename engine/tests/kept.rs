//! Runs that read their inputs where the caller has them, and outputs that outlast their run: nobody writes what another
//! holds, and nothing is copied that need not be.

use std::sync::Arc;
use weblane_engine::onnx::{Dim, Graph, Model, Node, OpsetId, TypeProto, ValueInfo};
use weblane_engine::session::Optimize;
use weblane_engine::{DType, Options, Session, Tensor};

fn node(op_type: &str, inputs: &[&str], output: &str) -> Node {
    let [inputs, outputs] = [inputs, &[output]].map(|names| names.iter().map(|s| (*s).into()).collect());
    Node { op_type: op_type.into(), inputs, outputs, ..Node::default() }
}

fn value(name: &str) -> ValueInfo {
    let shape = Some(vec![Dim::Param("n".into())]);
    ValueInfo { name: name.into(), ty: Some(TypeProto::Tensor { elem_type: DType::F32 as i32, shape }) }
}

/// `next = sum + x`, the same once more, `x` itself, and a value that shares the bytes of none: `neg = -(sum + x)`.
fn session(optimize: Optimize) -> Session {
    let graph = Graph {
        name: "sums".into(),
        nodes: vec![
            node("Add", &["sum", "x"], "next"),
            node("Identity", &["next"], "same"),
            node("Identity", &["x"], "given"),
            node("Neg", &["next"], "neg"),
        ],
        inputs: ["sum", "x"].map(value).into(),
        outputs: ["next", "same", "given", "neg"].map(value).into(),
        ..Graph::default()
    };
    let opset = OpsetId { domain: String::new(), version: 17 };
    let model = Model { ir_version: 8, opset_imports: vec![opset], graph, ..Model::default() };
    Session::from_bytes(&model.to_bytes(), Options { optimize, ..Options::default() }).unwrap()
}

fn tensor(values: &[f32]) -> Arc<Tensor> {
    Arc::new(Tensor::from_slice(&[values.len()], values).unwrap())
}

fn run(session: &mut Session, sum: &Arc<Tensor>, x: &Arc<Tensor>) {
    session.begin_with(&[("sum", sum.clone()), ("x", x.clone())]).unwrap();
    assert!(session.advance(|_, _| false).unwrap());
}

fn elements(tensor: &Tensor) -> &[f32] {
    tensor.as_slice().unwrap()
}

#[test]
fn what_is_kept_outlasts_later_runs() {
    for optimize in [Optimize::All, Optimize::None] {
        let mut session = session(optimize);
        let (sum, x) = (tensor(&[1.0, 2.0]), tensor(&[10.0, 20.0]));
        run(&mut session, &sum, &x);
        let kept = [0, 1, 2, 3].map(|i| session.keep(i).unwrap());
        session.end();
        run(&mut session, &kept[0], &kept[3]);
        session.end();
        session.begin(&[("sum", x.view()), ("x", x.view())]).unwrap();
        session.advance(|_, _| false).unwrap();
        let wanted: [&[f32]; 4] = [&[11.0, 22.0], &[11.0, 22.0], &[10.0, 20.0], &[-11.0, -22.0]];
        assert_eq!(kept.each_ref().map(|t| elements(t)), wanted);
        assert_eq!((elements(&sum), elements(&x)), (&[1.0, 2.0][..], &[10.0, 20.0][..]), "inputs are not worked in");
    }
}

#[test]
fn results_are_taken_without_a_copy_and_inputs_are_let_go() {
    let mut session = session(Optimize::All);
    let (sum, x) = (tensor(&[1.0]), tensor(&[2.0]));
    run(&mut session, &sum, &x);
    let at = session.output(3).unwrap().bytes().as_ptr();
    let kept = session.keep(3).unwrap();
    assert_eq!(kept.bytes().as_ptr(), at);
    assert!(Arc::strong_count(&sum) > 1, "outputs may lie in inputs");
    assert!(Arc::ptr_eq(&session.keep(2).unwrap(), &x), "an output that is an input");
    session.end();
    assert_eq!(Arc::strong_count(&sum), 1);
    assert!(session.output(3).is_err(), "the run is over");
    // Nobody holds the result of this run, so the next one works in it.
    drop(kept);
    run(&mut session, &sum, &x);
    assert_eq!(session.output(3).unwrap().bytes().as_ptr(), at);
}

#[test]
fn copies_of_inputs_that_are_kept_are_not_written_again() {
    let mut session = session(Optimize::All);
    let mut run = |x: f32| {
        let x = tensor(&[x]);
        session.begin(&[("sum", x.view()), ("x", x.view())]).unwrap();
        session.advance(|_, _| false).unwrap();
        let kept = session.keep(2).unwrap();
        session.end();
        kept
    };
    let kept = [1.0, 2.0, 3.0].map(&mut run);
    assert_eq!(kept.each_ref().map(|t| elements(t)[0]), [1.0, 2.0, 3.0]);
}

#[test]
fn wrong_inputs_leave_the_session_usable() {
    let mut session = session(Optimize::All);
    let (one, two) = (tensor(&[1.0]), tensor(&[1.0, 2.0]));
    assert!(session.begin_with(&[("sum", one.clone()), ("x", two.clone())]).is_err());
    assert!(session.begin_with(&[("sum", one.clone())]).is_err());
    assert!(session.advance(|_, _| false).is_err());
    session.end();
    run(&mut session, &one, &one);
    assert_eq!(elements(&session.keep(0).unwrap()), [2.0]);
}
