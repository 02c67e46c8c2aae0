//! For the tests of passes: small graphs written node by node, as an importer would make them, and a comparison of
//! what they compute with and without rewriting.

use super::{Pass, optimize, promote_half};
use crate::analyze::{Folding, analyze};
use crate::error::Result;
use crate::execute::Memory;
use crate::fact::{Dim, Fact};
use crate::graph::{Graph, Node, ValueId};
use crate::onnx::{Attribute, AttributeValue};
use crate::ops::{Attributes, PackCache, find};
use crate::plan::plan;
use crate::tensor::{DType, Tensor};
use half::f16;
use std::collections::HashMap;
use std::sync::Arc;
use weblane_kernels::par::{Cx, Pool};
use weblane_kernels::simd::Isa;

pub(crate) type Attrs<'a> = &'a [(&'a str, AttributeValue)];

pub(crate) fn int(v: i64) -> AttributeValue {
    AttributeValue::Int(v)
}

pub(crate) fn ints(v: &[i64]) -> AttributeValue {
    AttributeValue::Ints(v.to_vec())
}

pub(crate) fn float(v: f32) -> AttributeValue {
    AttributeValue::Float(v)
}

/// A graph in the making, with the facts of its inputs.
pub(crate) struct Net {
    pub(crate) graph: Graph,
    pub(crate) facts: Vec<Fact>,
    opset: i64,
    seed: u64,
}

/// Numbers in -1..1 from a seed.
pub(crate) fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

impl Net {
    pub(crate) fn new(opset: i64) -> Self {
        Net { graph: Graph::default(), facts: Vec::new(), opset, seed: 1 }
    }

    /// A `float32` input of known shape.
    pub(crate) fn input(&mut self, name: &str, dims: &[usize]) -> ValueId {
        self.input_of(name, Fact::new(DType::F32, dims))
    }

    pub(crate) fn input_of(&mut self, name: &str, fact: Fact) -> ValueId {
        let id = self.graph.add_value(name);
        self.graph.inputs.push(id);
        self.facts.push(fact);
        id
    }

    /// A `float32` input with names for some sizes.
    pub(crate) fn symbolic(&mut self, name: &str, dims: &[&str]) -> ValueId {
        let dim = |d: &&str| d.parse().map_or_else(|_| Dim::Symbol((*d).into()), Dim::Known);
        self.input_of(name, Fact::with_shape(DType::F32, dims.iter().map(dim).collect()))
    }

    pub(crate) fn constant(&mut self, dims: &[usize], values: &[f32]) -> ValueId {
        self.graph.add_constant("constant", Tensor::from_slice(dims, values).unwrap())
    }

    pub(crate) fn scalar(&mut self, value: f32) -> ValueId {
        self.constant(&[], &[value])
    }

    pub(crate) fn i64s(&mut self, values: &[i64]) -> ValueId {
        self.graph.add_constant("constant", Tensor::from_slice(&[values.len()], values).unwrap())
    }

    /// A constant of seeded numbers.
    pub(crate) fn weights(&mut self, dims: &[usize]) -> ValueId {
        self.seed += 1;
        let values = noise(dims.iter().product(), self.seed);
        self.constant(dims, &values)
    }

    pub(crate) fn op(&mut self, op_type: &str, inputs: &[ValueId]) -> ValueId {
        self.op_with(op_type, inputs, &[])
    }

    pub(crate) fn op_with(&mut self, op_type: &str, inputs: &[ValueId], attrs: Attrs) -> ValueId {
        self.node(op_type, &inputs.iter().copied().map(Some).collect::<Vec<_>>(), attrs)
    }

    /// A node with several results.
    pub(crate) fn nodes(&mut self, op_type: &str, inputs: &[ValueId], results: usize) -> Vec<ValueId> {
        let first = self.op(op_type, inputs);
        let mut outputs = vec![first];
        outputs.extend((1..results).map(|k| self.graph.add_value(format!("{op_type} {k}"))));
        if let Some(node) = self.graph.nodes.last_mut() {
            node.outputs = outputs.clone();
        }
        outputs
    }

    pub(crate) fn node(&mut self, op_type: &str, inputs: &[Option<ValueId>], attrs: Attrs) -> ValueId {
        self.nodes_of("", op_type, inputs, attrs, 1)[0]
    }

    /// An operator of onnxruntime's domain.
    pub(crate) fn contrib(&mut self, op_type: &str, inputs: &[Option<ValueId>], attrs: Attrs) -> ValueId {
        self.nodes_of("com.microsoft", op_type, inputs, attrs, 1)[0]
    }

    /// A node of any domain, with several results.
    pub(crate) fn nodes_of(
        &mut self,
        domain: &str,
        op_type: &str,
        inputs: &[Option<ValueId>],
        attrs: Attrs,
        results: usize,
    ) -> Vec<ValueId> {
        let attrs = attrs.iter().map(|(n, v)| Attribute { name: (*n).into(), value: v.clone() }).collect();
        let given = inputs.iter().map(Option::is_some).collect();
        let mut attributes = Attributes::new(op_type, self.opset, attrs, HashMap::new(), given, results);
        let registration = find(domain, op_type).unwrap_or_else(|| panic!("no operator {op_type}"));
        let op = (registration.parse)(&mut attributes).unwrap();
        attributes.finish().unwrap();
        let name = format!("{op_type}_{}", self.graph.nodes.len());
        let outputs: Vec<_> = (0..results).map(|_| self.graph.add_value(name.clone())).collect();
        self.graph.nodes.push(Node { name, op, inputs: inputs.to_vec(), outputs: outputs.clone() });
        outputs
    }

    /// Runs the graph as it stands, with seeded inputs of known shapes, checks every output against what its nodes give one
    /// by one, and returns the operators of the plan's steps.
    pub(crate) fn planned(&self) -> Vec<String> {
        let inputs: Vec<Tensor> = self
            .facts
            .iter()
            .enumerate()
            .map(|(i, f)| {
                let dims = f.dims().unwrap();
                Tensor::from_slice(&dims, &noise(dims.iter().product(), 5 + i as u64)).unwrap()
            })
            .collect();
        let known: Vec<Fact> = inputs.iter().map(|t| Fact::constant(Arc::new(t.clone()))).collect();
        let facts = with_cx(|cx| analyze(&self.graph, &known, cx, Folding { max_bytes: usize::MAX }).unwrap());
        for (id, got) in self.graph.outputs.iter().zip(run(&self.graph, &inputs)) {
            assert_eq!(got, **facts[id.index()].as_ref().unwrap().tensor().unwrap());
        }
        let steps = with_cx(|cx| plan(&self.graph, &self.facts, &PackCache::default(), cx).unwrap().steps);
        steps.iter().map(|s| s.node.op.name().to_owned()).collect()
    }

    pub(crate) fn output(&mut self, id: ValueId) {
        self.graph.outputs.push(id);
    }

    /// The same with casts around what computes in single precision, as the importer puts them.
    pub(crate) fn promoted(&self) -> Net {
        let facts = with_cx(|cx| analyze(&self.graph, &self.facts, cx, Folding { max_bytes: 0 }).unwrap());
        let graph = promote_half(self.graph.clone(), &facts).unwrap();
        Net { graph, facts: self.facts.clone(), opset: self.opset, seed: self.seed }
    }

    /// Rewrites by one pass.
    pub(crate) fn apply(&self, pass: impl Fn(&mut Graph, &Pass) -> Result<()>) -> Graph {
        let mut graph = self.graph.clone();
        with_cx(|cx| pass(&mut graph, &Pass::new(cx, &self.facts, true)).unwrap());
        graph.sort().unwrap();
        graph
    }

    /// Rewrites by all passes, checks that the numbers stay, and returns the names of the operators that are left.
    pub(crate) fn optimized(&self) -> Vec<String> {
        let graph = with_cx(|cx| optimize(self.graph.clone(), &self.facts, true, cx).unwrap());
        self.check(&graph);
        names(&graph)
    }

    /// Rewrites by one pass, checks that the numbers stay, and returns the names of the operators that are left.
    pub(crate) fn passed(&self, pass: impl Fn(&mut Graph, &Pass) -> Result<()>) -> Vec<String> {
        let graph = self.apply(pass);
        self.check(&graph);
        names(&graph)
    }

    /// Results of both graphs for seeded inputs; symbolic sizes become 3, 4, ... in the order of their first appearance.
    pub(crate) fn both(&self, rewritten: &Graph) -> [Vec<Tensor>; 2] {
        let mut symbols: Vec<Dim> = Vec::new();
        let mut size = |d: &Dim| {
            d.known().unwrap_or_else(|| {
                let at = symbols.iter().position(|s| s == d);
                3 + at.unwrap_or_else(|| {
                    symbols.push(d.clone());
                    symbols.len() - 1
                })
            })
        };
        let inputs: Vec<Tensor> = self
            .facts
            .iter()
            .enumerate()
            .map(|(i, f)| {
                let dims: Vec<usize> = f.shape.as_ref().unwrap().iter().map(&mut size).collect();
                let values: Vec<f32> = noise(dims.iter().product(), 77 + i as u64).iter().map(|v| 4.0 * v).collect();
                match f.dtype {
                    DType::I64 => {
                        let values: Vec<i64> = values.iter().map(|v| i64::from(*v > 0.0)).collect();
                        Tensor::from_slice(&dims, &values).unwrap()
                    }
                    DType::F16 => {
                        let values: Vec<f16> = values.iter().map(|v| f16::from_f32(v.abs())).collect();
                        Tensor::from_slice(&dims, &values).unwrap()
                    }
                    _ => Tensor::from_slice(&dims, &values).unwrap(),
                }
            })
            .collect();
        [run(&self.graph, &inputs), run(rewritten, &inputs)]
    }

    /// Whether both graphs give the same.
    pub(crate) fn check(&self, rewritten: &Graph) {
        let [want, got] = self.both(rewritten);
        assert_eq!(want.len(), got.len());
        for (want, got) in want.iter().zip(&got) {
            assert_eq!(want.dims(), got.dims());
            assert_eq!(want.dtype(), got.dtype());
            if want.dtype() == DType::F16 {
                let single = |t: &Tensor| t.as_slice::<f16>().unwrap().iter().map(|h| h.to_f32()).collect::<Vec<_>>();
                let (want, got) = (single(want), single(got));
                // A rounding less on the way to a rounded result.
                assert!(want.iter().zip(&got).all(|(w, g)| (w - g).abs() <= 2e-3 * w.abs()), "{got:?} for {want:?}");
                continue;
            }
            if want.dtype() != DType::F32 {
                assert_eq!(want, got);
                continue;
            }
            let (want, got) = (want.as_slice::<f32>().unwrap(), got.as_slice::<f32>().unwrap());
            for (i, (w, g)) in want.iter().zip(got).enumerate() {
                let fits = (w - g).abs() <= 2e-5 + 2e-5 * w.abs() || w == g || (w.is_nan() && g.is_nan());
                assert!(fits, "element {i}: {g} after rewriting, {w} before");
            }
        }
    }
}

/// The names of a graph's operators, in order.
pub(crate) fn names(graph: &Graph) -> Vec<String> {
    graph.nodes.iter().map(|n| n.op.name().to_owned()).collect()
}

pub(crate) fn with_cx<R>(f: impl FnOnce(&Cx) -> R) -> R {
    Pool::new(1).run(Isa::best(), f)
}

fn run(graph: &Graph, inputs: &[Tensor]) -> Vec<Tensor> {
    let facts: Vec<Fact> = inputs.iter().map(|t| Fact::new(t.dtype(), t.dims())).collect();
    with_cx(|cx| {
        let plan = plan(graph, &facts, &PackCache::default(), cx).unwrap();
        let mut memory = Memory::default();
        let views: Vec<_> = inputs.iter().map(Tensor::view).collect();
        memory.fit(&plan, &views).unwrap();
        for step in &plan.steps {
            memory.run_step(&plan, &views, step, cx).unwrap();
        }
        plan.outputs.iter().map(|&v| memory.view(&plan, &views, v).unwrap().to_tensor().unwrap()).collect()
    })
}
