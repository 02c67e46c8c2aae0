//! What a parallel region costs: empty tasks, one per lane, back to back and after pauses in which helpers go to sleep.

use std::time::{Duration, Instant};
use weblane_kernels::par::Pool;
use weblane_kernels::simd::Isa;

fn main() {
    for threads in 1..=std::thread::available_parallelism().map_or(1, usize::from) {
        let pool = Pool::new(threads);
        pool.run(Isa::best(), |cx| {
            let region = || cx.for_each(threads.max(2), u64::MAX, &|_| {});
            for _ in 0..10_000 {
                region();
            }
            let n = 100_000;
            let start = Instant::now();
            for _ in 0..n {
                region();
            }
            let spinning = start.elapsed().as_secs_f64() / f64::from(n);
            let mut asleep = Duration::ZERO;
            let m = 100;
            for _ in 0..m {
                std::thread::sleep(Duration::from_millis(2));
                let start = Instant::now();
                region();
                asleep += start.elapsed();
            }
            let asleep = asleep.as_secs_f64() / f64::from(m);
            println!("{threads} lanes: {:.2} us spinning, {:.2} us after a sleep", spinning * 1e6, asleep * 1e6);
        });
    }
}
