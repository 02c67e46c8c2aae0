//! Data movement, element by element.

use crate::movement::Axis;

/// What [`crate::movement::copy_strided`] does.
pub fn copy_strided(element: usize, axes: &[Axis], src: &[u8], src_offset: usize, dst: &mut [u8], dst_offset: usize) {
    match axes.split_first() {
        Some((axis, rest)) => {
            for i in 0..axis.len {
                let from = src_offset as isize + axis.src * i as isize;
                copy_strided(element, rest, src, from as usize, dst, dst_offset + axis.dst * i);
            }
        }
        None => dst[dst_offset * element..][..element].copy_from_slice(&src[src_offset * element..][..element]),
    }
}

/// Axis `a` of the result is axis `perm[a]` of `x`.
pub fn transpose(element: usize, dims: &[usize], perm: &[usize], x: &[u8]) -> Vec<u8> {
    let count: usize = dims.iter().product();
    let mut y = vec![0; x.len()];
    for (i, from) in x.chunks_exact(element).enumerate().take(count) {
        let mut index = vec![0; dims.len()];
        let mut rest = i;
        for a in (0..dims.len()).rev() {
            index[a] = rest % dims[a];
            rest /= dims[a];
        }
        let to = perm.iter().fold(0, |at, &p| at * dims[p] + index[p]);
        y[to * element..][..element].copy_from_slice(from);
    }
    y
}

/// Blocks `indices` of each of `outer` rows of `axis` blocks.
pub fn gather(outer: usize, axis: usize, block: usize, x: &[u8], indices: &[usize]) -> Vec<u8> {
    let mut y = Vec::new();
    for o in 0..outer {
        for &i in indices {
            y.extend_from_slice(&x[(o * axis + i) * block..][..block]);
        }
    }
    y
}
