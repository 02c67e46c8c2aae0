//! Walks a plan and decides nothing: one call per step, over the plan's memory.

use crate::analyze::evaluate;
use crate::error::{Error, Result};
use crate::fact::{Content, Fact};
use crate::ops::if_::If;
use crate::ops::{Infer, Io, Prepare};
use crate::plan::{Place, Plan, Step, check_released};
use crate::storage::Arena;
use crate::tensor::{Tensor, TensorMut, TensorView, byte_count};
use smallvec::SmallVec;
use std::sync::Arc;
use weblane_kernels::par::Cx;

/// The memory of one run: the arena and the tensors of dynamic values.
#[derive(Debug, Default)]
pub struct Memory {
    arena: Arena,
    dynamic: Vec<Option<Tensor>>,
}

impl Memory {
    /// Makes it fit a plan; what it held is lost.
    pub fn fit(&mut self, plan: &Plan) -> Result<()> {
        self.arena.ensure(plan.arena_bytes)?;
        self.dynamic.clear();
        self.dynamic.resize(plan.dynamic_values, None);
        Ok(())
    }

    /// Bytes of the arena.
    pub fn arena_bytes(&self) -> usize {
        self.arena.len()
    }

    /// Copies an input of the graph to its place; inputs that nothing reads are left out.
    pub fn set_input(&mut self, plan: &Plan, input: usize, view: &TensorView) -> Result<()> {
        let Some(value) = plan.inputs.get(input).copied().flatten() else { return Ok(()) };
        match &plan.values[value].place {
            Place::Arena(range) => self.arena.get_mut(range.clone()).copy_from_slice(view.bytes()),
            Place::Dynamic(slot) => self.dynamic[*slot] = Some(view.to_tensor()?),
            // The plan was made for this content.
            Place::Constant(_) => {}
        }
        Ok(())
    }

    /// A value, once its step has run.
    pub fn view<'a>(&'a self, plan: &'a Plan, value: usize) -> Result<TensorView<'a>> {
        let planned = &plan.values[value];
        match &planned.place {
            Place::Arena(range) => TensorView::new(planned.dtype, &planned.dims, self.arena.get(range.clone())),
            Place::Constant(t) => Ok(t.view()),
            Place::Dynamic(slot) => self.dynamic[*slot]
                .as_ref()
                .map(Tensor::view)
                .ok_or_else(|| Error::internal("a value is read before it is computed")),
        }
    }

    /// Bytes of a step's operands and of its results. To be asked before it runs, and after.
    pub fn bytes_of(&self, plan: &Plan, values: impl Iterator<Item = usize>) -> u64 {
        let bytes = |v: usize| match &plan.values[v].place {
            Place::Arena(range) => range.len(),
            // Not of its elements, which may be gone into a packed form.
            Place::Constant(t) => byte_count(t.dtype(), t.dims()).unwrap_or(0),
            Place::Dynamic(slot) => self.dynamic[*slot].as_ref().map_or(0, |t| t.bytes().len()),
        };
        values.map(|v| bytes(v) as u64).sum()
    }

    /// Runs one step.
    pub fn run_step(&mut self, plan: &Plan, step: &Step, cx: &Cx) -> Result<()> {
        let run = if step.is_dynamic { self.run_dynamic(plan, step, cx) } else { self.run_planned(plan, step, cx) };
        run.map_err(|e| step.node.error(e))
    }

    fn run_planned(&mut self, plan: &Plan, step: &Step, cx: &Cx) -> Result<()> {
        let Memory { arena, dynamic } = self;
        let in_place = |k: usize| step.in_place == Some(k);
        let range = |v: usize| match &plan.values[v].place {
            Place::Arena(r) => Some(r.clone()),
            _ => None,
        };
        let reads = step.inputs.iter().enumerate().filter(|(k, _)| !in_place(*k)).filter_map(|(_, v)| range((*v)?));
        let writes = step.outputs.iter().filter_map(|&v| range(v));
        let mut read: SmallVec<[&[u8]; 16]> = SmallVec::new();
        let mut written: SmallVec<[&mut [u8]; 4]> = SmallVec::new();
        arena.split(reads, writes, |r| read.push(r), |w| written.push(w))?;

        let mut read = read.into_iter();
        let mut inputs: SmallVec<[Option<TensorView>; 16]> = SmallVec::new();
        for (k, v) in step.inputs.iter().enumerate() {
            inputs.push(match v.map(|v| &plan.values[v]) {
                None => None,
                Some(_) if in_place(k) => None,
                Some(p) => Some(match &p.place {
                    Place::Arena(_) => TensorView::new(p.dtype, &p.dims, read.next().unwrap_or_default())?,
                    Place::Constant(t) => t.view(),
                    Place::Dynamic(slot) => match &dynamic[*slot] {
                        Some(t) => t.view(),
                        None => return Err(Error::internal("an operand is read before it is computed")),
                    },
                }),
            });
        }
        let mut written = written.into_iter();
        // A result that is known already, beside others that are not, is computed with them and goes nowhere.
        let known = step.outputs.iter().map(|&v| &plan.values[v]).filter(|p| matches!(p.place, Place::Constant(_)));
        let mut known = known.map(|p| Tensor::zeros(p.dtype, &p.dims)).collect::<Result<Vec<_>>>()?;
        let mut known = known.iter_mut();
        let mut outputs: SmallVec<[TensorMut; 4]> = SmallVec::new();
        for &v in &step.outputs {
            let p = &plan.values[v];
            outputs.push(match &p.place {
                Place::Arena(_) => TensorMut::new(p.dtype, &p.dims, written.next().unwrap_or_default())?,
                _ => known.next().ok_or_else(|| Error::internal("a result of a planned step is dynamic"))?.view_mut(),
            });
        }
        let mut io = Io { inputs: &inputs, outputs: &mut outputs, in_place: step.in_place };
        match &step.compute {
            Some(compute) => compute.run(cx, &mut io),
            None => step.node.op.run(cx, &mut io),
        }
    }

    fn run_dynamic(&mut self, plan: &Plan, step: &Step, cx: &Cx) -> Result<()> {
        let views: Vec<Option<TensorView>> =
            step.inputs.iter().map(|v| v.map(|v| self.view(plan, v)).transpose()).collect::<Result<_>>()?;
        let decides = step.node.op.shape_operands();
        // Of some constants there is only what a kernel packed.
        let is_packed = views.iter().flatten().any(TensorView::is_released);
        let mut facts = Vec::with_capacity(views.len());
        for (k, view) in views.iter().enumerate() {
            let Some(view) = view else {
                facts.push(None);
                continue;
            };
            let mut fact = Fact::new(view.dtype, view.dims);
            let constant = match step.inputs[k].map(|v| &plan.values[v].place) {
                Some(Place::Constant(t)) => Some(t),
                _ => None,
            };
            if decides.contains(&k) || step.node.op.shapes_by_running() {
                fact.content = Content::Tensor(match constant {
                    Some(t) => t.clone(),
                    None => Arc::new(view.to_tensor()?),
                });
            } else if is_packed && let Some(t) = constant {
                fact.content = Content::Tensor(t.clone());
            }
            facts.push(Some(fact));
        }
        let infer = |facts: &[Option<Fact>]| {
            let inputs: Vec<Option<&Fact>> = facts.iter().map(Option::as_ref).collect();
            step.node.op.infer(&Infer { inputs: &inputs, outputs: step.outputs.len(), cx })
        };
        let mut results = infer(&facts)?;
        // A body that counts what it finds, such as the boxes that a suppression leaves.
        if step.node.op.is::<If>() && results.iter().any(|f| f.dims().is_none()) {
            for (fact, view) in facts.iter_mut().zip(&views) {
                if let (Some(fact), Some(view)) = (fact, view)
                    && fact.tensor().is_none()
                {
                    fact.content = Content::Tensor(Arc::new(view.to_tensor()?));
                }
            }
            results = infer(&facts)?;
        }
        let compute = if is_packed {
            let cache = &plan.packed;
            let inputs: Vec<Option<&Fact>> = facts.iter().map(Option::as_ref).collect();
            let outputs: Vec<&Fact> = results.iter().collect();
            let compute =
                step.node.op.prepare(&Prepare { isa: cx.isa(), cx, inputs: &inputs, outputs: &outputs, cache })?;
            check_released(&inputs, compute.as_deref())?;
            compute
        } else {
            None
        };
        let tensors = evaluate(&step.node, &results, &views, compute.as_deref(), cx)?;
        drop(views);
        for (&v, tensor) in step.outputs.iter().zip(tensors) {
            match plan.values[v].place {
                Place::Dynamic(slot) => self.dynamic[slot] = Some(tensor),
                // Known already.
                Place::Constant(_) => {}
                Place::Arena(_) => return Err(Error::internal("a result of a dynamic step has a planned place")),
            }
        }
        for &slot in &step.frees {
            self.dynamic[slot] = None;
        }
        Ok(())
    }
}
