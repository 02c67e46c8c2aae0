//! What kernel tests share.

use crate::par::{Cx, Pool};
use crate::simd::Isa;

/// Runs `f` on every available instruction set, with one lane and with two.
pub(crate) fn each_context(mut f: impl FnMut(&Cx<'_>)) {
    for lanes in [1, 2] {
        let pool = Pool::new(lanes);
        for isa in Isa::available() {
            pool.run(isa, &mut f);
        }
    }
}

/// Small pseudo-random integers (a linear congruential generator), whose sums and products are exact in f32.
pub(crate) fn integers(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as f32 % 9.0 - 4.0
        })
        .collect()
}
