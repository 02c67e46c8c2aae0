//! Walks a plan and decides nothing: one call per step, over the plan's memory.

use crate::analyze::evaluate;
use crate::error::{Error, Result};
use crate::fact::{Content, Fact};
use crate::ops::if_::If;
use crate::ops::{Infer, Io, Prepare};
use crate::plan::{Place, Plan, Planned, Step, check_released};
use crate::storage::Arena;
use crate::tensor::{Tensor, TensorMut, TensorView, byte_count};
use smallvec::SmallVec;
use std::ops::Range;
use std::sync::Arc;
use weblane_kernels::par::Cx;

/// The memory of one run: the arena, results of the graph that have tensors of their own, and the tensors of dynamic values.
/// The inputs of the graph stay where the caller has them; each method takes the same ones.
#[derive(Debug, Default)]
pub struct Memory {
    arena: Arena,
    /// `None` while a step writes it.
    results: Vec<Option<Arc<Tensor>>>,
    /// Tensors that nobody wants any more, for results of the next run.
    spare: Vec<Tensor>,
    dynamic: Vec<Option<Arc<Tensor>>>,
}

impl Memory {
    /// Makes it fit a plan; what it held is lost, but for results that somebody keeps.
    pub fn fit(&mut self, plan: &Plan, inputs: &[TensorView]) -> Result<()> {
        self.arena.ensure(plan.arena_bytes)?;
        self.results.resize(plan.results.len(), None);
        for (slot, (dtype, dims)) in self.results.iter_mut().zip(&plan.results) {
            let mut own = slot.take();
            let fits = |t: &mut Tensor| t.dtype() == *dtype && t.dims() == dims.as_slice();
            if !own.as_mut().and_then(Arc::get_mut).is_some_and(fits) {
                let former = own.and_then(Arc::into_inner).or_else(|| self.spare.pop());
                own = Some(Arc::new(match former {
                    Some(tensor) => tensor.recycled(*dtype, dims)?,
                    None => Tensor::zeros(*dtype, dims)?,
                }));
            }
            *slot = own;
        }
        self.spare.clear();
        self.dynamic.clear();
        self.dynamic.resize(plan.dynamic_values, None);
        for (value, view) in plan.inputs.iter().zip(inputs) {
            if let Some(Place::Dynamic(slot)) = value.map(|v| &plan.values[v].place) {
                self.dynamic[*slot] = Some(Arc::new(view.to_tensor()?));
            }
        }
        Ok(())
    }

    /// Takes tensors that nobody wants any more, the first one first: results of the next run may be made in them.
    pub fn recycle(&mut self, tensors: impl DoubleEndedIterator<Item = Tensor>) {
        self.spare.clear();
        self.spare.extend(tensors.rev());
    }

    /// Bytes of the arena.
    pub fn arena_bytes(&self) -> usize {
        self.arena.len()
    }

    /// A value, once its step has run.
    pub fn view<'a>(&'a self, plan: &'a Plan, inputs: &[TensorView<'a>], value: usize) -> Result<TensorView<'a>> {
        let planned = &plan.values[value];
        let early = || Error::internal("a value is read before it is computed");
        match &planned.place {
            Place::Arena(range) => TensorView::new(planned.dtype, &planned.dims, self.arena.get(range.clone())),
            Place::Input(input, range) => part_of_input(inputs, *input, range, planned),
            Place::Result(slot) => self.results[*slot].as_ref().map(|t| t.view()).ok_or_else(early),
            Place::Constant(t) => Ok(t.view()),
            Place::Dynamic(slot) => self.dynamic[*slot].as_ref().map(|t| t.view()).ok_or_else(early),
        }
    }

    /// A value of a run that is over, to keep: without a copy if it has a tensor of its own, of which the next run then
    /// makes another.
    pub fn keep(&self, plan: &Plan, inputs: &[TensorView], value: usize) -> Result<Arc<Tensor>> {
        let own = match plan.values[value].place {
            Place::Result(slot) => self.results[slot].clone(),
            Place::Dynamic(slot) => self.dynamic[slot].clone(),
            _ => Some(Arc::new(self.view(plan, inputs, value)?.to_tensor()?)),
        };
        own.ok_or_else(|| Error::internal("a value is kept before it is computed"))
    }

    /// Bytes of a step's operands and of its results. To be asked before it runs, and after.
    pub fn bytes_of(&self, plan: &Plan, values: impl Iterator<Item = usize>) -> u64 {
        let bytes = |v: usize| match &plan.values[v].place {
            Place::Arena(range) | Place::Input(_, range) => range.len(),
            Place::Result(slot) => self.results[*slot].as_ref().map_or(0, |t| t.bytes().len()),
            // Not of its elements, which may be gone into a packed form.
            Place::Constant(t) => byte_count(t.dtype(), t.dims()).unwrap_or(0),
            Place::Dynamic(slot) => self.dynamic[*slot].as_ref().map_or(0, |t| t.bytes().len()),
        };
        values.map(|v| bytes(v) as u64).sum()
    }

    /// Runs one step.
    pub fn run_step(&mut self, plan: &Plan, inputs: &[TensorView], step: &Step, cx: &Cx) -> Result<()> {
        let run = if step.is_dynamic {
            self.run_dynamic(plan, inputs, step, cx)
        } else {
            self.run_planned(plan, inputs, step, cx)
        };
        run.map_err(|e| step.node.error(e))
    }

    fn run_planned(&mut self, plan: &Plan, given: &[TensorView], step: &Step, cx: &Cx) -> Result<()> {
        // Taken out, so that others can be read meanwhile.
        let mut own: SmallVec<[(usize, Arc<Tensor>); 2]> = SmallVec::new();
        for &v in &step.outputs {
            if let Place::Result(slot) = plan.values[v].place {
                let tensor = self.results[slot].take();
                own.push((slot, tensor.ok_or_else(|| Error::internal("a result is written twice by one step"))?));
            }
        }
        let run = self.run_into(plan, given, step, &mut own, cx);
        for (slot, tensor) in own {
            self.results[slot] = Some(tensor);
        }
        run
    }

    /// `own` are those of the results that have tensors of their own, in their order.
    fn run_into(
        &mut self,
        plan: &Plan,
        given: &[TensorView],
        step: &Step,
        own: &mut [(usize, Arc<Tensor>)],
        cx: &Cx,
    ) -> Result<()> {
        let Memory { arena, results, dynamic, .. } = self;
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
        let early = || Error::internal("an operand is read before it is computed");
        let mut inputs: SmallVec<[Option<TensorView>; 16]> = SmallVec::new();
        for (k, v) in step.inputs.iter().enumerate() {
            inputs.push(match v.map(|v| &plan.values[v]) {
                None => None,
                Some(_) if in_place(k) => None,
                Some(p) => Some(match &p.place {
                    Place::Arena(_) => TensorView::new(p.dtype, &p.dims, read.next().unwrap_or_default())?,
                    Place::Input(input, range) => part_of_input(given, *input, range, p)?,
                    Place::Result(slot) => results[*slot].as_ref().ok_or_else(early)?.view(),
                    Place::Constant(t) => t.view(),
                    Place::Dynamic(slot) => dynamic[*slot].as_ref().ok_or_else(early)?.view(),
                }),
            });
        }
        let (mut written, mut own) = (written.into_iter(), own.iter_mut());
        let lost = || Error::internal("a result of a planned step has no place, or somebody else reads it");
        // A result that is known already, beside others that are not, is computed with them and goes nowhere.
        let known = step.outputs.iter().map(|&v| &plan.values[v]).filter(|p| matches!(p.place, Place::Constant(_)));
        let mut known = known.map(|p| Tensor::zeros(p.dtype, &p.dims)).collect::<Result<Vec<_>>>()?;
        let mut known = known.iter_mut();
        let mut outputs: SmallVec<[TensorMut; 4]> = SmallVec::new();
        for &v in &step.outputs {
            let p = &plan.values[v];
            outputs.push(match &p.place {
                Place::Arena(_) => TensorMut::new(p.dtype, &p.dims, written.next().unwrap_or_default())?,
                Place::Result(_) => own.next().and_then(|(_, t)| Arc::get_mut(t)).ok_or_else(lost)?.view_mut(),
                _ => known.next().ok_or_else(lost)?.view_mut(),
            });
        }
        let mut io = Io { inputs: &inputs, outputs: &mut outputs, in_place: step.in_place };
        match &step.compute {
            Some(compute) => compute.run(cx, &mut io),
            None => step.node.op.run(cx, &mut io),
        }
    }

    fn run_dynamic(&mut self, plan: &Plan, given: &[TensorView], step: &Step, cx: &Cx) -> Result<()> {
        let views: Vec<Option<TensorView>> =
            step.inputs.iter().map(|v| v.map(|v| self.view(plan, given, v)).transpose()).collect::<Result<_>>()?;
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
                Place::Dynamic(slot) => self.dynamic[slot] = Some(Arc::new(tensor)),
                // Known already.
                Place::Constant(_) => {}
                Place::Arena(_) | Place::Input(..) | Place::Result(_) => {
                    return Err(Error::internal("a result of a dynamic step has a planned place"));
                }
            }
        }
        for &slot in &step.frees {
            self.dynamic[slot] = None;
        }
        Ok(())
    }
}

/// A value that is bytes of an input.
fn part_of_input<'a>(
    inputs: &[TensorView<'a>],
    input: usize,
    range: &Range<usize>,
    planned: &'a Planned,
) -> Result<TensorView<'a>> {
    let bytes = inputs.get(input).and_then(|view| view.bytes().get(range.clone()));
    let bytes = bytes.ok_or_else(|| Error::internal("the plan reads more of an input than there is"))?;
    TensorView::new(planned.dtype, &planned.dims, bytes)
}
