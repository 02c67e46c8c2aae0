//! Preparation: a kernel chosen for known shapes, with constant operands packed once per session.

use super::Io;
use crate::error::{Error, Result};
use crate::fact::Fact;
use crate::tensor::{Dims, Tensor};
use std::any::Any;
use std::collections::{HashMap, HashSet};
use std::fmt::{Debug, Formatter};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use weblane_kernels::par::Cx;
use weblane_kernels::simd::Isa;

/// A node that is ready to run for one set of shapes.
pub trait Compute: Send + Sync {
    /// Computes.
    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()>;

    /// Name of the kernel, for profiles.
    fn kernel(&self) -> &str;

    /// Operands that are read in packed form only, so that their elements may be gone; see
    /// [`super::Operator::prepack`].
    fn packed_operands(&self) -> &[usize] {
        &[]
    }

    /// Multiplications and additions of one run, for profiles; 0 where nobody counts them.
    fn flops(&self) -> u64 {
        0
    }

    /// As [`super::Operator::in_place`].
    fn in_place(&self) -> &'static [usize] {
        &[]
    }
}

// Not what it holds: the functions that would print weights and tables of all operators are 24 kB of WebAssembly.
impl Debug for dyn Compute {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.kernel())
    }
}

/// What kernels may trade for speed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// Convolutions may be computed with fewer products (Winograd's method); the error stays within
    /// [`weblane_kernels::winograd::MAX_ERROR`] of the largest output.
    #[default]
    Fast,
    /// Every product that the definition of an operator names is computed.
    Exact,
}

/// What is known where a kernel is chosen: all shapes, and the constants.
#[derive(Debug)]
pub struct Prepare<'a> {
    /// The instruction set that the session runs on.
    pub isa: Isa,
    /// For work at preparation: plans of bodies, constant folding in them.
    pub cx: &'a Cx<'a>,
    /// One entry per operand; `None` where an optional one was left out.
    pub inputs: &'a [Option<&'a Fact>],
    /// One entry per result.
    pub outputs: &'a [&'a Fact],
    /// Packed constants of the session.
    pub cache: &'a PackCache,
}

impl<'a> Prepare<'a> {
    /// Shape of an operand.
    pub fn dims(&self, i: usize) -> Result<Dims> {
        let fact = self.inputs.get(i).copied().flatten();
        fact.and_then(Fact::dims).ok_or_else(|| Error::internal(format!("the shape of operand {i} is not known")))
    }

    /// Shape of a result.
    pub fn output_dims(&self, i: usize) -> Result<Dims> {
        let fact = self.outputs.get(i);
        fact.and_then(|f| f.dims()).ok_or_else(|| Error::internal(format!("the shape of result {i} is not known")))
    }

    /// A constant operand; `None` when it is left out or computed at run time.
    pub fn constant(&self, i: usize) -> Option<&'a Arc<Tensor>> {
        self.inputs.get(i).copied().flatten().and_then(Fact::tensor)
    }

    /// Rank of an operand, when it is known.
    pub fn rank(&self, i: usize) -> Option<usize> {
        self.inputs.get(i).copied().flatten().and_then(Fact::rank)
    }

    /// Whether the operand is there.
    pub fn has(&self, i: usize) -> bool {
        self.inputs.get(i).is_some_and(Option::is_some)
    }
}

/// Packed forms of constants, shared by all plans of a session; a clone is another handle to the same forms.
#[derive(Clone, Debug, Default)]
pub struct PackCache {
    precision: Precision,
    forms: Arc<Mutex<Forms>>,
}

#[derive(Debug, Default)]
struct Forms {
    /// Identity of each tensor by its address. The weak reference keeps the address from being used again for another.
    ids: HashMap<usize, (Weak<Tensor>, u64)>,
    next_id: u64,
    packed: HashMap<(u64, String), Arc<dyn Any + Send + Sync>>,
}

impl Forms {
    fn id(&mut self, tensor: &Arc<Tensor>) -> u64 {
        let Forms { ids, next_id, .. } = self;
        let new = || {
            *next_id += 1;
            (Arc::downgrade(tensor), *next_id)
        };
        ids.entry(Arc::as_ptr(tensor) as usize).or_insert_with(new).1
    }
}

impl PackCache {
    /// An empty one for a session.
    pub fn new(precision: Precision) -> Self {
        PackCache { precision, ..PackCache::default() }
    }

    /// What the session lets kernels do.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    fn forms(&self) -> Result<MutexGuard<'_, Forms>> {
        self.forms.lock().map_err(|_| broken())
    }

    /// A number that stands for this tensor in this cache, for the `kind` of a form that depends on several tensors.
    pub fn id(&self, tensor: &Arc<Tensor>) -> Result<u64> {
        Ok(self.forms()?.id(tensor))
    }

    /// From now on the forms of `original` are found under `released`, which has no elements.
    pub fn release(&self, original: &Arc<Tensor>, released: &Arc<Tensor>) -> Result<()> {
        let mut forms = self.forms()?;
        let id = forms.id(original);
        forms.ids.insert(Arc::as_ptr(released) as usize, (Arc::downgrade(released), id));
        Ok(())
    }

    /// The packed form of `source` under `kind`, made by `pack` the first time. `kind` names everything but the
    /// source that the packed form depends on.
    pub fn get<T: Any + Send + Sync>(
        &self,
        source: &Arc<Tensor>,
        kind: &str,
        pack: impl FnOnce(&Tensor) -> Result<T>,
    ) -> Result<Arc<T>> {
        let key = {
            let mut forms = self.forms()?;
            let key = (forms.id(source), kind.to_owned());
            if let Some(packed) = forms.packed.get(&key) {
                return packed.clone().downcast().map_err(|_| broken());
            }
            key
        };
        // Not under the lock: other lanes pack meanwhile. Whoever is first with the same form wins.
        let packed: Arc<dyn Any + Send + Sync> = Arc::new(pack(source)?);
        self.forms()?.packed.entry(key).or_insert(packed).clone().downcast().map_err(|_| broken())
    }

    /// Frees the forms of constants that are gone.
    pub fn forget_dead(&self) {
        if let Ok(mut forms) = self.forms.lock() {
            let Forms { ids, packed, .. } = &mut *forms;
            ids.retain(|_, (tensor, _)| tensor.strong_count() > 0);
            let alive: HashSet<u64> = ids.values().map(|(_, id)| *id).collect();
            packed.retain(|(id, _), _| alive.contains(id));
        }
    }

    /// Number of packed forms.
    pub fn len(&self) -> usize {
        self.forms.lock().map_or(0, |forms| forms.packed.len())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn broken() -> Error {
    Error::internal("the cache of packed weights is broken")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packs_once_per_source_and_kind() {
        let cache = PackCache::default();
        let (a, b) = (Arc::new(Tensor::scalar(1f32).unwrap()), Arc::new(Tensor::scalar(1f32).unwrap()));
        for (source, kind) in [(&a, "x"), (&a, "x"), (&a, "y"), (&b, "x")] {
            cache.get(source, kind, |t| Ok(t.len())).unwrap();
        }
        assert_eq!(cache.len(), 3);
        drop(b);
        cache.forget_dead();
        assert_eq!(cache.len(), 2);
        assert!(cache.get::<String>(&a, "x", |_| Ok(String::new())).is_err(), "another type under the same kind");
    }

    #[test]
    fn forms_outlive_the_elements_they_were_made_of() {
        let cache = PackCache::default();
        let original = Arc::new(Tensor::from_slice(&[2], &[3f32, 4.0]).unwrap());
        let sum = |t: &Tensor| Ok(t.as_slice::<f32>()?.iter().sum::<f32>());
        assert_eq!(*cache.get(&original, "sum", sum).unwrap(), 7.0);
        let released = Arc::new(Tensor::released(original.dtype(), original.dims()));
        cache.release(&original, &released).unwrap();
        let (id, elements) = (cache.id(&original).unwrap(), Arc::downgrade(&original));
        drop(original);
        assert!(elements.upgrade().is_none(), "the cache keeps the elements");
        assert_eq!((cache.id(&released).unwrap(), *cache.get(&released, "sum", sum).unwrap()), (id, 7.0));
        assert!(cache.get(&released, "another", sum).unwrap_err().message.contains("packed"));
    }
}
