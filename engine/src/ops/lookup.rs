//! A function of 8-bit integers as a table of its 256 results: what the optimiser makes of pointwise operators between
//! quantised tensors, and of a change of scale.

use super::qparams::check_byte;
use super::{Infer, Io, Operator, Permuted, Registration, Table};
use crate::error::{Error, Result};
use crate::fact::Fact;
use crate::tensor::DType;
use weblane_kernels::int8::{lookup, lookup_in_place};
use weblane_kernels::par::Cx;

/// No model has this operator by name.
pub const OPERATORS: &[Registration] = &[];

/// `y = table[x]`, where x counts as an unsigned byte.
#[derive(Clone, Debug, PartialEq)]
pub struct Lookup {
    /// 256 results, as unsigned bytes.
    pub table: Table<u8>,
    /// Element type of the result: `uint8` or `int8`.
    pub dtype: DType,
}

impl Operator for Lookup {
    fn name(&self) -> &'static str {
        "weblane.Lookup"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        check_byte("an operand", x.dtype)?;
        cx.results(vec![Fact { dtype: self.dtype, shape: x.shape.clone(), content: Default::default() }])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let table: &[u8; 256] =
            (&*self.table).try_into().map_err(|_| Error::internal("a table that has not 256 entries"))?;
        if io.in_place.is_some() {
            lookup_in_place(cx, table, io.output(0)?.bytes());
            return Ok(());
        }
        let x = io.input(0)?.bytes();
        Ok(lookup(cx, x, table, io.output(0)?.bytes())?)
    }

    fn in_place(&self) -> &'static [usize] {
        &[0]
    }

    fn permuted(&self, _: &[usize], _: &[Option<&Fact>]) -> Option<Permuted> {
        Permuted::elementwise(self, 1)
    }
}
