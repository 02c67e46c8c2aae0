//! A steady-state run of MobileNetV2 allocates nothing, counted by the allocator itself.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use weblane_engine::{Options, Session, Tensor};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are those that `System` wants.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(p, layout) }
    }

    unsafe fn realloc(&self, p: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(p, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations_of_a_run(session: &mut Session, feeds: &[(&str, &Tensor)]) -> u64 {
    let views: Vec<_> = feeds.iter().map(|(n, t)| (*n, t.view())).collect();
    let run = |session: &mut Session| {
        session.begin(&views).unwrap();
        assert!(session.advance(|_, _| false).unwrap());
        session.output(0).unwrap().len()
    };
    for _ in 0..3 {
        run(session);
    }
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    run(session);
    ALLOCATIONS.load(Ordering::Relaxed) - before
}

// One test function: the counter is the whole process's.
#[test]
fn a_steady_run_of_mobilenet_v2_allocates_nothing() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/models/mobilenet_v2/model.onnx");
    let Ok(bytes) = std::fs::read(&path) else {
        eprintln!("skipped: {} is not there; models/build.py builds it", path.display());
        return;
    };
    let input = Tensor::from_slice(&[1, 3, 224, 224], &vec![0.5f32; 3 * 224 * 224]).unwrap();
    for threads in [1, 2] {
        let mut session = Session::from_bytes(&bytes, Options { threads, ..Options::default() }).unwrap();
        let n = allocations_of_a_run(&mut session, &[("input", &input)]);
        assert_eq!(n, 0, "allocations of a steady run on {threads} threads");
    }
}
