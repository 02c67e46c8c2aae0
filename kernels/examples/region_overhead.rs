//! What a parallel region costs: one task per lane, and each waits until all have begun, so that every lane must come.
//! Back to back, where helpers spin, and after pauses in which they go to sleep. Quantiles, since other programs disturb.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use weblane_kernels::par::Pool;
use weblane_kernels::simd::Isa;

fn main() {
    for threads in 2..=std::thread::available_parallelism().map_or(1, usize::from) {
        Pool::new(threads).run(Isa::best(), |cx| {
            let region = || {
                let begun = AtomicUsize::new(0);
                cx.for_each(threads, u64::MAX, &|_| {
                    begun.fetch_add(1, Ordering::Relaxed);
                    while begun.load(Ordering::Relaxed) < threads {
                        core::hint::spin_loop();
                    }
                });
            };
            let measure = |regions: u32, pause: Option<Duration>| {
                let mut times: Vec<f64> = (0..200)
                    .map(|_| {
                        if let Some(pause) = pause {
                            std::thread::sleep(pause);
                        }
                        let start = Instant::now();
                        for _ in 0..regions {
                            region();
                        }
                        start.elapsed().as_secs_f64() * 1e6 / f64::from(regions)
                    })
                    .collect();
                times.sort_by(f64::total_cmp);
                format!("{:.2} us (10%) {:.2} us (50%)", times[20], times[100])
            };
            println!("{threads} lanes, spinning: {}", measure(1000, None));
            println!("{threads} lanes, asleep:   {}", measure(1, Some(Duration::from_millis(2))));
        });
    }
}
