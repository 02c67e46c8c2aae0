//! How an instruction set multiplies 8-bit numbers.

use crate::error::{Error, Result};
use crate::simd::{Isa, dot_available};
use core::fmt;

/// A form of the dot product. All give the same sums; which one is exact, and fastest, differs from machine to machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// Pairs of 16-bit products: operands are widened. Exact on every machine.
    Wide,
    /// Four products of an unsigned and a signed byte at a time, whose pairs are added in 16 bits and would saturate. It
    /// is made exact by weights: of those neighbours that could, a part is taken off and added in a step of its own. For
    /// right-hand sides where few need that; others are packed as [`Form::Wide`].
    Split,
    /// Four products of an unsigned and a signed byte at a time.
    U8S8,
    /// Four products of signed bytes at a time.
    S8S8,
}

impl Form {
    /// All forms.
    pub const ALL: [Self; 4] = [Self::Wide, Self::Split, Self::U8S8, Self::S8S8];

    /// The forms that are exact on this machine with this instruction set, the fastest last; never empty.
    pub fn available(isa: Isa) -> Vec<Self> {
        Self::ALL.into_iter().filter(|form| dot_available(isa, *form)).collect()
    }

    /// The fastest of them for weights, which are packed once.
    pub fn best(isa: Isa) -> Self {
        Self::ALL.into_iter().rev().find(|form| dot_available(isa, *form)).unwrap_or(Self::Wide)
    }

    /// The fastest of them for a right-hand side that is packed in each run.
    pub fn best_unprepared(isa: Isa) -> Self {
        match Self::best(isa) {
            Self::Split => Self::Wide,
            form => form,
        }
    }

    /// The name in messages and profiles.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Wide => "i16",
            Self::Split => "u8s8 split",
            Self::U8S8 => "u8s8",
            Self::S8S8 => "s8s8",
        }
    }

    /// Neighbours along k that a lane of 32 bits holds.
    pub(crate) const fn group(self) -> usize {
        match self {
            Self::Wide => 2,
            Self::Split | Self::U8S8 | Self::S8S8 => 4,
        }
    }

    /// Refuses a form that is not [available](Self::available).
    pub(crate) fn check(self, isa: Isa) -> Result<()> {
        if self == Self::Wide || dot_available(isa, self) {
            Ok(())
        } else {
            Err(Error::new(format!("the 8-bit dot product {self} is not available with {isa}")))
        }
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
