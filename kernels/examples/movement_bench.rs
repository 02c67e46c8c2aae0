//! Bytes per second of data movement beside a plain copy of the same size:
//! `cargo run --release -p weblane-kernels --example movement_bench`.

use std::time::Instant;
use weblane_kernels::movement::transpose;
use weblane_kernels::par::Pool;
use weblane_kernels::simd::Isa;

fn main() {
    let cases: &[(&str, usize, &[usize], &[usize])] = &[
        ("copy", 4, &[1, 64, 112, 112], &[0, 1, 2, 3]),
        ("matrix 512x512", 4, &[512, 512], &[1, 0]),
        ("matrix 768x3072", 4, &[768, 3072], &[1, 0]),
        ("NCHW to NHWC, 64x112x112", 4, &[1, 64, 112, 112], &[0, 2, 3, 1]),
        ("NHWC to NCHW, 112x112x64", 4, &[1, 112, 112, 64], &[0, 3, 1, 2]),
        ("NCHW to NHWC, 3x224x224", 4, &[1, 3, 224, 224], &[0, 2, 3, 1]),
        ("NHWC to NCHW, 224x224x3", 4, &[1, 224, 224, 3], &[0, 3, 1, 2]),
        ("heads, 128x12x64", 4, &[1, 128, 12, 64], &[0, 2, 1, 3]),
        ("keys, 128x12x64", 4, &[1, 128, 12, 64], &[0, 2, 3, 1]),
        ("bytes, 64x112x112", 1, &[1, 64, 112, 112], &[0, 2, 3, 1]),
    ];
    let pool = Pool::new(1);
    for (name, element, dims, perm) in cases {
        let bytes = dims.iter().product::<usize>() * element;
        let x = vec![1u8; bytes];
        let mut y = vec![0u8; bytes];
        let mut best = f64::INFINITY;
        for _ in 0..20 {
            let start = Instant::now();
            pool.run(Isa::best(), |cx| transpose(cx, *element, dims, perm, &x, &mut y)).expect("sizes fit");
            best = best.min(start.elapsed().as_secs_f64());
        }
        println!("{name:28} {:8.3} ms {:6.1} GB/s", best * 1e3, bytes as f64 / best / 1e9);
    }
}
