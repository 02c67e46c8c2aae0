//! Preparation: a kernel chosen for known shapes, with constant operands packed once per session.

use super::Io;
use crate::error::{Error, Result};
use crate::fact::Fact;
use crate::tensor::{Dims, Tensor};
use std::any::Any;
use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, Weak};
use weblane_kernels::par::Cx;
use weblane_kernels::simd::Isa;

/// A node that is ready to run for one set of shapes.
pub trait Compute: Debug + Send + Sync {
    /// Computes.
    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()>;

    /// Name of the kernel, for profiles.
    fn kernel(&self) -> &str;

    /// Operands that were packed: the plan need not keep their original form.
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

/// What is known where a kernel is chosen: all shapes, and the constants.
#[derive(Debug)]
pub struct Prepare<'a> {
    /// The instruction set that the session runs on.
    pub isa: Isa,
    /// For work at preparation: plans of bodies, constant folding in them.
    pub cx: &'a Cx<'a>,
    /// One entry per operand; `None` where an optional one was left out.
    pub inputs: &'a [Option<Fact>],
    /// One entry per result.
    pub outputs: &'a [Fact],
    /// Packed constants of the session.
    pub cache: &'a PackCache,
}

impl<'a> Prepare<'a> {
    /// Shape of an operand.
    pub fn dims(&self, i: usize) -> Result<Dims> {
        let fact = self.inputs.get(i).and_then(Option::as_ref);
        fact.and_then(Fact::dims).ok_or_else(|| Error::internal(format!("the shape of operand {i} is not known")))
    }

    /// Shape of a result.
    pub fn output_dims(&self, i: usize) -> Result<Dims> {
        let fact = self.outputs.get(i);
        fact.and_then(Fact::dims).ok_or_else(|| Error::internal(format!("the shape of result {i} is not known")))
    }

    /// A constant operand; `None` when it is left out or computed at run time.
    pub fn constant(&self, i: usize) -> Option<&'a Arc<Tensor>> {
        self.inputs.get(i).and_then(Option::as_ref).and_then(Fact::tensor)
    }

    /// Whether the operand is there.
    pub fn has(&self, i: usize) -> bool {
        self.inputs.get(i).is_some_and(Option::is_some)
    }
}

type Key = (usize, String);
type Entry = (Weak<Tensor>, Arc<dyn Any + Send + Sync>);

/// Packed forms of constants, shared by all plans of a session.
#[derive(Debug, Default)]
pub struct PackCache {
    entries: Mutex<HashMap<Key, Entry>>,
}

impl PackCache {
    /// The packed form of `source` under `kind`, made by `pack` the first time. `kind` names everything but the
    /// source that the packed form depends on.
    pub fn get<T: Any + Send + Sync>(
        &self,
        source: &Arc<Tensor>,
        kind: &str,
        pack: impl FnOnce(&Tensor) -> Result<T>,
    ) -> Result<Arc<T>> {
        let key = (Arc::as_ptr(source) as usize, kind.to_owned());
        let broken = || Error::internal("the cache of packed weights is broken");
        if let Some((_, packed)) = self.entries.lock().map_err(|_| broken())?.get(&key) {
            return packed.clone().downcast().map_err(|_| broken());
        }
        let packed = Arc::new(pack(source)?);
        // The weak reference keeps the address from being used again for another tensor.
        let entry: Entry = (Arc::downgrade(source), packed.clone());
        self.entries.lock().map_err(|_| broken())?.insert(key, entry);
        Ok(packed)
    }

    /// Frees the forms of constants that are gone.
    pub fn forget_dead(&self) {
        if let Ok(mut entries) = self.entries.lock() {
            entries.retain(|_, (source, _)| source.strong_count() > 0);
        }
    }

    /// Number of packed forms.
    pub fn len(&self) -> usize {
        self.entries.lock().map_or(0, |e| e.len())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
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
}
