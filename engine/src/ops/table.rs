//! Numbers that belong to an operator itself, not to the graph: scales, zero points, bounds.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

/// Shared by all copies of the operator. Its debug text says where it lies instead of what it holds: passes tell
/// operators apart by that text, and equal places hold equal numbers.
#[derive(Clone, PartialEq)]
pub struct Table<T>(Arc<[T]>);

impl<T: Clone + PartialEq> Table<T> {
    /// The numbers, or one of them if they are all equal.
    pub fn shortest(values: Vec<T>) -> Self {
        match values.first() {
            Some(first) if values.iter().all(|v| v == first) => Table([first.clone()].into()),
            _ => Table(values.into()),
        }
    }
}

impl<T> From<Vec<T>> for Table<T> {
    fn from(values: Vec<T>) -> Self {
        Table(values.into())
    }
}

impl<T> Deref for Table<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T> fmt::Debug for Table<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:p}", self.0.len(), self.0.as_ptr())
    }
}
