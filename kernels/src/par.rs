//! Threads: how a kernel spreads its work.
//!
//! A kernel cuts its work into tasks that write disjoint parts of the output and hands them to [`Cx::for_each`]. The cut
//! depends on sizes alone, never on the number of threads, so that results are the same bits for any number of them.
//!
//! A network is a chain of some hundred short regions, and entering rayon for each costs 12 to 35 microseconds in a
//! browser. Here the helper lanes are rayon tasks that stay: they watch one atomic word, the gate, join every region that
//! opens there, spin a bounded time for the next one and then sleep. A region on two lanes takes 0.3 microseconds natively
//! while the helper spins and 20 to 40 when it must be woken (`cargo run --release --example region_overhead`, AMD EPYC).
//! Nothing is allocated per run or region. Scratch memory belongs to the pool and only ever grows.
//!
//! ```text
//! owner                                      helper
//!   write job, give each lane its span         loop:
//!   gate = (epoch + 1, open, 0 active)           wait until the gate is open with an epoch not seen yet
//!   wake sleepers, if any                        compare-exchange: active + 1
//!   claim and run tasks until none is left       claim and run tasks until none is left
//!   gate: clear open; wait until 0 active        gate: active - 1; wake the owner if it sleeps
//! ```
//!
//! Every lane has a span of neighbouring tasks of its own, which it works through from the front; one that is done takes
//! from the backs of the others. So a lane meets the same part of a tensor in layer after layer, in its own cache: with one
//! counter for all, half of what a task reads was written by the other core. On a virtual machine with spells in which its
//! two cores multiplied as fast as ever but seemed to share no cache, a native MobileNetV2 on two lanes (128-bit vectors)
//! took 12 ms with the counter and 9 with spans; outside of them 7.6 and 7.4.
//!
//! Why this is sound:
//! - The job (a pointer into the owner's stack) is written only while the gate is closed with nobody active, and read only
//!   by lanes that entered by the compare-exchange, which fails once the gate is closed. The owner leaves only when it
//!   closed the gate and saw nobody active. So no lane can hold the pointer after the owner's frame is gone.
//! - Opening is a release store and entering an acquire read-modify-write of the same word: a lane that entered sees the
//!   job and the counter. Leaving is a release decrement and the owner's last look an acquire load; decrements are
//!   read-modify-writes, which continue each other's release sequences, so the owner sees the writes of all lanes.
//! - Whoever decrements the count of a span may take one task of it: its own lane the next at the front, others the last
//!   at the back. As many tasks as the count said lie between the two ends, so no task is taken twice, and every claimed
//!   task is finished when nobody is active. Helpers that come late, or never, are not waited for: the owner does the work itself.
//! - No wake-up is lost: a helper announces itself as a sleeper and then looks at the gate, the owner opens the gate and
//!   then looks for sleepers, all four sequentially consistent; one of them must see the other. The wait itself is guarded
//!   by a mutex that the waker takes.
//! - The epoch wraps after 2^18 regions. A lane that slept through exactly that many skips one region, which costs
//!   parallelism and nothing else.

use crate::simd::Isa;
use core::any::Any;
use core::cell::UnsafeCell;
use core::marker::PhantomData;
use core::panic::AssertUnwindSafe;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::panic::{catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Regions of less than this many scalar operations run on the calling lane: about five microseconds of work, several
/// times what a region costs when the helpers spin.
pub const MIN_PARALLEL_COST: u64 = 64 * 1024;

/// More lanes than any machine that runs a browser has; keeps the count inside its bits of the gate.
const MAX_LANES: usize = 1024;

// The gate, from the lowest bit: active helpers (12 bits), open, owner sleeps, epoch (18 bits).
const ACTIVE: u32 = (1 << 12) - 1;
const OPEN: u32 = 1 << 12;
const OWNER_SLEEPS: u32 = 1 << 13;
const EPOCH_ONE: u32 = 1 << 14;
const EPOCH: u32 = !(EPOCH_ONE - 1);

/// Polls of the gate before a helper gives up its processor or, in the page, goes to sleep; some tens of microseconds.
/// A `pause` takes about 15 ns, the loop without one (wasm has none) about 1 ns.
const SPINS: u32 = if cfg!(target_arch = "wasm32") { 40_000 } else { 2_000 };
/// Then natively this many times `yield_now` before sleeping: on an idle machine about 50 microseconds more, and on one
/// with more threads than cores the others get to work.
#[cfg(feature = "threads")]
const YIELDS: u32 = if cfg!(target_arch = "wasm32") { 0 } else { 100 };

/// A value on its own cache lines (two, since processors fetch them in pairs).
#[repr(align(128))]
struct Line<T>(T);

/// The tasks of one lane that nobody has claimed. Written as a whole only while the gate is closed and nobody active; the
/// gate orders that, so nothing here orders anything.
#[derive(Default)]
struct Span {
    /// How many there are.
    left: AtomicUsize,
    /// The next one for the span's own lane, which alone changes it.
    front: AtomicUsize,
    /// One past the last, where other lanes take.
    back: AtomicUsize,
}

impl Span {
    fn set(&self, tasks: core::ops::Range<usize>) {
        self.left.store(tasks.len(), Ordering::Relaxed);
        self.front.store(tasks.start, Ordering::Relaxed);
        self.back.store(tasks.end, Ordering::Relaxed);
    }

    /// The right to one task.
    fn claim(&self) -> bool {
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    }

    /// The next task, for the span's own lane.
    fn take_front(&self) -> Option<usize> {
        self.claim().then(|| {
            let task = self.front.load(Ordering::Relaxed);
            self.front.store(task + 1, Ordering::Relaxed);
            task
        })
    }

    /// The last task, for other lanes.
    fn take_back(&self) -> Option<usize> {
        self.claim().then(|| self.back.fetch_sub(1, Ordering::Relaxed) - 1)
    }
}

/// What the lanes of an open region do.
#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize, &mut [f32]) + Sync),
    scratch_len: usize,
}

struct Shared {
    gate: Line<AtomicU32>,
    /// One per lane.
    spans: Box<[Line<Span>]>,
    /// A task panicked: claim no more.
    stop: AtomicBool,
    /// A region is running; another one (nested, or of a concurrent run) runs inline meanwhile. Whoever set it is the
    /// owner: it alone may write `job` and touch scratch 0, and all scratch while nobody is active.
    busy: AtomicBool,
    /// Set when the pool goes away.
    exit: AtomicBool,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    /// Signals helpers that a region opened or the pool goes away.
    wake_helpers: Condvar,
    /// Signals the owner that the last helper left.
    wake_owner: Condvar,
    job: UnsafeCell<Job>,
    /// One buffer per lane.
    scratch: Box<[UnsafeCell<Buffer>]>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Temporaries of [`Cx::with_workspace`] that are not in use.
    workspaces: Mutex<Vec<Buffer>>,
    cancel: CancelFlag,
}

// SAFETY: `job` and `scratch` are accessed as the fields' comments and the module's comment say; `Job::task` points to a
// `Sync` closure. All else is `Sync` by itself.
unsafe impl Sync for Shared {}
// SAFETY: as above; nothing in it belongs to a thread.
unsafe impl Send for Shared {}

/// Locks, whether or not a panic happened elsewhere: no state here is left half-changed by one.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Memory aligned to 64 bytes that only grows.
#[derive(Default)]
struct Buffer(Vec<CacheLine>);

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct CacheLine([f32; 16]);

impl Buffer {
    fn len(&self) -> usize {
        self.0.len() * 16
    }

    fn grow(&mut self, len: usize) {
        if self.len() < len {
            // Not `resize`: the old contents are scratch, copying them would be in vain.
            self.0 = vec![CacheLine([0.0; 16]); len.div_ceil(16)];
        }
    }

    fn get(&mut self, len: usize) -> &mut [f32] {
        &mut bytemuck::cast_slice_mut(&mut self.0)[..len]
    }
}

/// A request to stop that other threads, and the page through shared memory, can make while a run is under way.
#[derive(Clone, Debug, Default)]
pub struct CancelFlag(Arc<AtomicU32>);

impl CancelFlag {
    /// Asks the runs of the pool to stop. Regions stop between tasks, so outputs are incomplete from here on.
    pub fn cancel(&self) {
        self.0.store(1, Ordering::Relaxed);
    }

    /// Takes the request back.
    pub fn reset(&self) {
        self.0.store(0, Ordering::Relaxed);
    }

    /// Whether there is a request.
    #[inline]
    pub fn is_cancelled(&self) -> bool {
        // Relaxed: the flag guards no other memory.
        self.0.load(Ordering::Relaxed) != 0
    }

    /// Where the flag lies, so that the page can set it in shared memory: a 32-bit word, nonzero means stop. It stays
    /// there as long as the pool lives.
    pub fn as_ptr(&self) -> *const u32 {
        self.0.as_ptr()
    }
}

/// A set of lanes: the thread that calls [`Pool::run`] and its helpers.
///
/// Natively the helpers are threads of the pool's own; in the page they are tasks on the workers that
/// `wasm-bindgen-rayon` started, so start `threads - 1` of those before. Without the feature `threads` there is one lane.
/// Helpers sleep between runs and end with the pool.
pub struct Pool {
    shared: Arc<Shared>,
    threads: usize,
    /// Its threads end when it is dropped.
    #[cfg(all(feature = "threads", not(target_arch = "wasm32")))]
    _helpers: Option<rayon::ThreadPool>,
}

impl Pool {
    /// A pool of `threads` lanes (at least one), the caller included.
    ///
    /// There are fewer if the build has no threads or the system does not give that many; see [`Pool::threads`].
    pub fn new(threads: usize) -> Self {
        #[cfg(all(feature = "threads", target_arch = "wasm32"))]
        // A global pool of one is what rayon makes up where nobody started workers: its only lane is the caller.
        let threads = if threads <= 1 { 1 } else { threads.min(rayon::current_num_threads() + 1) };
        let pool = Self::without_helpers(threads);
        pool.start_helpers();
        pool
    }

    /// [`Pool::new`], but the helpers of a page come with [`Pool::start_helpers`]; until then the caller does without.
    pub fn without_helpers(threads: usize) -> Self {
        let wanted = if cfg!(feature = "threads") { threads.clamp(1, MAX_LANES) } else { 1 };
        let shared = Arc::new(Shared {
            gate: Line(AtomicU32::new(0)),
            spans: (0..wanted).map(|_| Line(Span::default())).collect(),
            stop: AtomicBool::new(false),
            busy: AtomicBool::new(false),
            exit: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake_helpers: Condvar::new(),
            wake_owner: Condvar::new(),
            job: UnsafeCell::new(Job { task: &|_: usize, _: &mut [f32]| {}, scratch_len: 0 }),
            scratch: (0..wanted).map(|_| UnsafeCell::default()).collect(),
            panic: Mutex::new(None),
            workspaces: Mutex::new(Vec::new()),
            cancel: CancelFlag::default(),
        });
        #[cfg(all(feature = "threads", not(target_arch = "wasm32")))]
        {
            let helpers = (wanted > 1)
                .then(|| {
                    rayon::ThreadPoolBuilder::new()
                        .num_threads(wanted - 1)
                        .thread_name(|i| format!("weblane-{}", i + 1))
                        .build()
                        .ok()
                })
                .flatten();
            if let Some(helpers) = &helpers {
                for lane in 1..wanted {
                    let shared = shared.clone();
                    helpers.spawn(move || shared.help(lane));
                }
            }
            let threads = if helpers.is_some() { wanted } else { 1 };
            Self { shared, threads, _helpers: helpers }
        }
        #[cfg(not(all(feature = "threads", not(target_arch = "wasm32"))))]
        Self { shared, threads: wanted }
    }

    /// Has the workers of `wasm-bindgen-rayon` help, which must have been started; natively there is nothing to do. Once.
    pub fn start_helpers(&self) {
        #[cfg(all(feature = "threads", target_arch = "wasm32"))]
        {
            for lane in 1..self.threads {
                let shared = self.shared.clone();
                rayon::spawn(move || shared.help(lane));
            }
            if self.threads > 1 {
                aborting::install_hook();
            }
        }
    }

    /// How many lanes there are, the caller included.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// The flag that stops this pool's runs. Reset it before a run that follows a cancelled one.
    pub fn cancel_flag(&self) -> &CancelFlag {
        &self.shared.cancel
    }

    /// Calls `f` with access to the lanes; kernels use vectors of `isa`.
    ///
    /// Runs may overlap (two sessions on one runtime): they take turns region by region, and a region that finds the
    /// helpers busy runs inline.
    pub fn run<R>(&self, isa: Isa, f: impl FnOnce(&Cx<'_>) -> R) -> R {
        self.run_on(usize::MAX, isa, f)
    }

    /// [`Pool::run`] on no more lanes than that: one for work too small to wake the helpers for.
    pub fn run_on<R>(&self, lanes: usize, isa: Isa, f: impl FnOnce(&Cx<'_>) -> R) -> R {
        f(&Cx { shared: &self.shared, threads: self.threads.min(lanes), isa })
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.exit.store(true, Ordering::SeqCst);
        let _guard = lock(&self.shared.sleep);
        self.shared.wake_helpers.notify_all();
    }
}

impl core::fmt::Debug for Pool {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads).finish_non_exhaustive()
    }
}

/// Gives back ownership of the region, also when a task panics on the owner's lane.
struct Busy<'a>(&'a AtomicBool);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Shared {
    /// A helper's life.
    #[cfg(feature = "threads")]
    fn help(&self, lane: usize) {
        // The first region has epoch 1, so a helper that starts late joins whatever is open.
        let mut seen = 0;
        let news = |seen: u32| {
            let gate = self.gate.0.load(Ordering::SeqCst);
            (gate & OPEN != 0 && gate & EPOCH != seen).then_some(gate)
        };
        let mut idle = 0;
        while !self.exit.load(Ordering::SeqCst) {
            if let Some(gate) = news(seen) {
                // The count cannot overflow into the flags: there are at most MAX_LANES lanes.
                let enter = self.gate.0.compare_exchange_weak(gate, gate + 1, Ordering::AcqRel, Ordering::Relaxed);
                if enter.is_ok() {
                    seen = gate & EPOCH;
                    self.work(lane);
                    self.leave();
                    idle = 0;
                }
            } else if idle < SPINS {
                idle += 1;
                core::hint::spin_loop();
            } else if idle < SPINS + YIELDS {
                idle += 1;
                std::thread::yield_now();
            } else {
                let mut guard = lock(&self.sleep);
                self.sleepers.fetch_add(1, Ordering::SeqCst);
                while news(seen).is_none() && !self.exit.load(Ordering::SeqCst) {
                    guard = self.wake_helpers.wait(guard).unwrap_or_else(PoisonError::into_inner);
                }
                self.sleepers.fetch_sub(1, Ordering::SeqCst);
                idle = 0;
            }
        }
    }

    /// A helper leaves the region.
    #[cfg(feature = "threads")]
    fn leave(&self) {
        let before = self.gate.0.fetch_sub(1, Ordering::AcqRel);
        if before & OWNER_SLEEPS != 0 && before & ACTIVE == 1 {
            let _guard = lock(&self.sleep);
            self.wake_owner.notify_all();
        }
    }

    /// The next task for a lane: of its own span, else of the next lane's that has one.
    fn claim(&self, lane: usize) -> Option<usize> {
        let lanes = self.spans.len();
        self.spans[lane]
            .0
            .take_front()
            .or_else(|| (1..lanes).find_map(|step| self.spans[(lane + step) % lanes].0.take_back()))
    }

    /// Claims and runs tasks until none is left, as the owner (lane 0) or an active helper.
    fn work(&self, lane: usize) {
        // SAFETY: the owner wrote the job before it opened the gate, and it stays until nobody is active.
        let job = unsafe { *self.job.get() };
        // SAFETY: the owner's frame, with the closure in it, stays until nobody is active.
        let task = unsafe { &*job.task };
        // SAFETY: a lane touches its own buffer only, and the owner grew it before it opened the gate.
        let scratch = unsafe { &mut *self.scratch[lane].get() }.get(job.scratch_len);
        #[cfg(all(feature = "threads", target_arch = "wasm32"))]
        let _inside = aborting::enter(self, lane);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            while !self.stop.load(Ordering::Relaxed) && !self.cancel.is_cancelled() {
                let Some(i) = self.claim(lane) else { break };
                task(i, scratch);
            }
        }));
        if let Err(payload) = outcome {
            self.fail(payload);
        }
    }

    /// Keeps the first panic for the owner and stops the region.
    fn fail(&self, payload: Box<dyn Any + Send>) {
        self.stop.store(true, Ordering::Relaxed);
        lock(&self.panic).get_or_insert(payload);
    }

    /// One region on all lanes. The caller owns `busy`.
    fn region(&self, tasks: usize, scratch_len: usize, task: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        for buffer in &self.scratch {
            // SAFETY: this is the owner, the gate is closed and nobody is active.
            unsafe { &mut *buffer.get() }.grow(scratch_len);
        }
        // SAFETY: only the lifetime changes; `work` uses the pointer while this frame exists.
        let task = unsafe {
            core::mem::transmute::<
                *const (dyn Fn(usize, &mut [f32]) + Sync + '_),
                *const (dyn Fn(usize, &mut [f32]) + Sync + 'static),
            >(task)
        };
        // SAFETY: this is the owner, the gate is closed and nobody is active.
        unsafe { *self.job.get() = Job { task, scratch_len } };
        let lanes = self.spans.len();
        let mut start = 0;
        for (lane, span) in self.spans.iter().enumerate() {
            let end = start + tasks / lanes + usize::from(lane < tasks % lanes);
            span.0.set(start..end);
            start = end;
        }
        self.stop.store(false, Ordering::Relaxed);
        // Only owners change the gate while it is closed, so this is no race. SeqCst includes release.
        let epoch = (self.gate.0.load(Ordering::Relaxed) & EPOCH).wrapping_add(EPOCH_ONE);
        self.gate.0.store(epoch | OPEN, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) != 0 {
            let _guard = lock(&self.sleep);
            self.wake_helpers.notify_all();
        }
        // Does not unwind: panics are kept.
        self.work(0);
        let mut gate = self.gate.0.fetch_and(!OPEN, Ordering::AcqRel);
        let mut polls = 0;
        while gate & ACTIVE != 0 {
            polls += 1;
            if polls < SPINS {
                core::hint::spin_loop();
                gate = self.gate.0.load(Ordering::Acquire);
            } else {
                // A task takes long: let the processor go. The last helper either sees the flag and, once this thread
                // waits and has released the mutex, wakes it, or it left before and the count read here is zero.
                let mut guard = lock(&self.sleep);
                gate = self.gate.0.fetch_or(OWNER_SLEEPS, Ordering::AcqRel);
                while gate & ACTIVE != 0 {
                    guard = self.wake_owner.wait(guard).unwrap_or_else(PoisonError::into_inner);
                    gate = self.gate.0.load(Ordering::Acquire);
                }
            }
        }
        if self.stop.load(Ordering::Relaxed)
            && let Some(payload) = lock(&self.panic).take()
        {
            resume_unwind(payload);
        }
    }
}

/// What a kernel knows about where it runs: the instruction set, the lanes and their memory.
pub struct Cx<'a> {
    shared: &'a Shared,
    threads: usize,
    isa: Isa,
}

impl Cx<'_> {
    /// The instruction set to [`dispatch`](crate::simd::dispatch) to. Dispatch inside a task, not around the loop.
    #[inline]
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// How many lanes there are. Results must not depend on it.
    #[inline]
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Whether somebody asked this run to stop. Regions look between tasks; a long task that looks itself stops sooner.
    #[inline]
    pub fn cancelled(&self) -> bool {
        self.shared.cancel.is_cancelled()
    }

    /// Calls `f(i)` for every `i < tasks`, each once, in any order, on all lanes.
    ///
    /// `cost` is about the number of scalar operations of all tasks together; below [`MIN_PARALLEL_COST`] the tasks run
    /// here, in order, and so they do inside a task of another region. Each lane begins with its own part of the tasks and
    /// claims one at a time: number them in the order of the data, and make a few per lane, which balance well. When [`Cx::cancelled`] turns true, the remaining tasks are left out.
    ///
    /// # Panics
    /// If a task does, with its message, after all lanes have stopped.
    pub fn for_each(&self, tasks: usize, cost: u64, f: &(dyn Fn(usize) + Sync)) {
        self.for_each_scratch(tasks, cost, 0, &|i, _| f(i));
    }

    /// [`Cx::for_each`] with `scratch_len` floats of scratch for each lane, aligned to 64 bytes.
    ///
    /// Their contents at the start of a task are unspecified. The memory stays with the pool, so that a steady state
    /// allocates nothing (a nested region, which finds its lane's scratch in use, does).
    pub fn for_each_scratch(
        &self,
        tasks: usize,
        cost: u64,
        scratch_len: usize,
        f: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) {
        let parallel = self.threads > 1 && tasks > 1 && cost >= MIN_PARALLEL_COST;
        if parallel || scratch_len > 0 {
            // Acquire pairs with the release in `Busy`: an owner sees what the last one did.
            if !self.shared.busy.swap(true, Ordering::Acquire) {
                let _busy = Busy(&self.shared.busy);
                if parallel {
                    self.shared.region(tasks, scratch_len, f);
                } else {
                    // SAFETY: the owner may use scratch 0.
                    let buffer = unsafe { &mut *self.shared.scratch[0].get() };
                    buffer.grow(scratch_len);
                    self.inline(tasks, buffer.get(scratch_len), f);
                }
                return;
            }
        }
        let mut buffer = Buffer::default();
        buffer.grow(scratch_len);
        self.inline(tasks, buffer.get(scratch_len), f);
    }

    fn inline(&self, tasks: usize, scratch: &mut [f32], f: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        for i in 0..tasks {
            if self.cancelled() {
                break;
            }
            f(i, scratch);
        }
    }

    /// Lends `f` a temporary of `len` floats, aligned to 64 bytes, with unspecified contents.
    ///
    /// The memory stays with the pool. Uses may nest and overlap: each has its own memory.
    pub fn with_workspace<R>(&self, len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
        let mut buffer = {
            let mut free = lock(&self.shared.workspaces);
            // The smallest that suffices, else the largest, so that a repeated sequence soon finds all it needs.
            let fitting = (0..free.len()).filter(|&i| free[i].len() >= len).min_by_key(|&i| free[i].len());
            match fitting.or_else(|| (0..free.len()).max_by_key(|&i| free[i].len())) {
                Some(i) => free.swap_remove(i),
                None => Buffer::default(),
            }
        };
        buffer.grow(len);
        let result = f(buffer.get(len));
        lock(&self.shared.workspaces).push(buffer);
        result
    }
}

impl core::fmt::Debug for Cx<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Cx").field("threads", &self.threads).field("isa", &self.isa).finish()
    }
}

/// A slice whose disjoint parts different tasks may write at the same time.
///
/// ```
/// use weblane_kernels::par::{DisjointMut, Pool};
/// use weblane_kernels::simd::Isa;
///
/// let mut squares = vec![0; 100];
/// let out = DisjointMut::new(&mut squares);
/// Pool::new(2).run(Isa::best(), |cx| {
///     cx.for_each(10, 1_000_000, &|task| {
///         // SAFETY: every task has its own ten elements.
///         let part = unsafe { out.range(task * 10, 10) };
///         for (i, x) in part.iter_mut().enumerate() {
///             *x = (task * 10 + i) * (task * 10 + i);
///         }
///     });
/// });
/// assert!(squares.iter().enumerate().all(|(i, &x)| x == i * i));
/// ```
#[derive(Clone, Copy, Debug)]
pub struct DisjointMut<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: it gives out parts of a `&mut [T]` that do not overlap (the contract of `range`), as `split_at_mut` would.
unsafe impl<T: Send> Send for DisjointMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for DisjointMut<'_, T> {}

impl<'a, T> DisjointMut<'a, T> {
    /// Takes the slice for as long as parts of it are given out.
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// Number of elements of the whole slice.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the slice has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where the slice begins, for kernels that write through pointers; the contract of [`range`](Self::range) holds.
    pub fn as_mut_ptr(&self) -> *mut T {
        self.start
    }

    /// The elements `start..start + len`.
    ///
    /// # Panics
    /// If the range does not lie within the slice.
    ///
    /// # Safety
    /// While the result is in use, no other reference to any of these elements may be.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn range(&self, start: usize, len: usize) -> &'a mut [T] {
        assert!(start <= self.len && len <= self.len - start, "{start}+{len} of {}", self.len);
        // SAFETY: in bounds as just checked; the caller promises that nobody else uses these elements.
        unsafe { core::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

/// The page's build aborts on panic: nothing unwinds, a panicking helper would stay active forever and the owner wait for
/// it. The panic hook runs before the abort, so the helper leaves the region there; the owner then panics in its turn.
#[cfg(all(feature = "threads", target_arch = "wasm32"))]
mod aborting {
    use super::Shared;
    use core::cell::Cell;

    thread_local! {
        static INSIDE: Cell<*const Shared> = const { Cell::new(core::ptr::null()) };
    }

    pub(super) struct Inside;

    impl Drop for Inside {
        fn drop(&mut self) {
            INSIDE.set(core::ptr::null());
        }
    }

    pub(super) fn enter(shared: &Shared, lane: usize) -> Option<Inside> {
        (lane > 0).then(|| {
            INSIDE.set(shared);
            Inside
        })
    }

    pub(super) fn install_hook() {
        static ONCE: std::sync::Once = std::sync::Once::new();
        ONCE.call_once(|| {
            let previous = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                previous(info);
                let shared = INSIDE.replace(core::ptr::null());
                if !shared.is_null() {
                    // SAFETY: it is set only while this thread works in a region of that pool.
                    let shared = unsafe { &*shared };
                    shared.fail(Box::new(info.to_string()));
                    shared.leave();
                }
            }));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LARGE: u64 = u64::MAX;

    fn pools() -> impl Iterator<Item = Pool> {
        (1..=4).map(Pool::new)
    }

    #[test]
    fn every_task_runs_once() {
        for pool in pools() {
            pool.run(Isa::Scalar, |cx| {
                for tasks in [0, 1, 2, 3, 7, 100, 10_000] {
                    for cost in [0, LARGE] {
                        let counts: Vec<AtomicU32> = (0..tasks).map(|_| AtomicU32::new(0)).collect();
                        cx.for_each(tasks, cost, &|i| {
                            counts[i].fetch_add(1, Ordering::Relaxed);
                        });
                        assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{tasks} tasks");
                    }
                }
            });
        }
    }

    #[test]
    fn thousands_of_tiny_regions_see_each_other() {
        for pool in pools() {
            let mut data = vec![0u64; 64];
            pool.run(Isa::Scalar, |cx| {
                for step in 0..20_000u64 {
                    let out = DisjointMut::new(&mut data);
                    cx.for_each(8, LARGE, &|i| {
                        // SAFETY: every task has its own eight elements.
                        for x in unsafe { out.range(i * 8, 8) } {
                            // Plain, unsynchronised: each region must see all writes of the one before.
                            assert_eq!(*x, step);
                            *x += 1;
                        }
                    });
                }
            });
            assert!(data.iter().all(|&x| x == 20_000));
        }
    }

    #[cfg(feature = "threads")]
    #[test]
    fn helpers_that_slept_wake_up() {
        let pool = Pool::new(2);
        let caller = std::thread::current().id();
        for _ in 0..5 {
            // Long enough that the helper has gone to sleep.
            std::thread::sleep(std::time::Duration::from_millis(20));
            pool.run(Isa::Scalar, |cx| {
                // Both lanes must take a task, or the barrier holds forever.
                let barrier = std::sync::Barrier::new(2);
                let helped = AtomicBool::new(false);
                cx.for_each(2, LARGE, &|_| {
                    barrier.wait();
                    helped.fetch_or(std::thread::current().id() != caller, Ordering::Relaxed);
                });
                assert!(helped.load(Ordering::Relaxed));
            });
        }
    }

    #[cfg(feature = "threads")]
    #[test]
    fn an_owner_that_waits_long_is_woken() {
        let pool = Pool::new(2);
        pool.run(Isa::Scalar, |cx| {
            let caller = std::thread::current().id();
            let barrier = std::sync::Barrier::new(2);
            let done = AtomicBool::new(false);
            cx.for_each(2, LARGE, &|_| {
                barrier.wait();
                if std::thread::current().id() != caller {
                    std::thread::sleep(std::time::Duration::from_millis(50));
                    done.store(true, Ordering::Relaxed);
                }
            });
            assert!(done.load(Ordering::Relaxed));
        });
    }

    #[test]
    fn nested_regions_run_inline() {
        for pool in pools() {
            pool.run(Isa::Scalar, |cx| {
                let count = AtomicU32::new(0);
                cx.for_each_scratch(10, LARGE, 100, &|i, outer| {
                    outer.fill(i as f32);
                    let here = std::thread::current().id();
                    cx.for_each_scratch(10, LARGE, 100, &|_, inner| {
                        assert_eq!(std::thread::current().id(), here);
                        inner.fill(-1.0);
                        count.fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(outer.iter().all(|&x| x == i as f32), "the inner region got the outer one's scratch");
                });
                assert_eq!(count.load(Ordering::Relaxed), 100);
            });
        }
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller_and_the_pool_lives_on() {
        for pool in pools() {
            for cost in [0, LARGE] {
                for bad in [0, 57, 99] {
                    let error = catch_unwind(AssertUnwindSafe(|| {
                        pool.run(Isa::Scalar, |cx| cx.for_each(100, cost, &|i| assert!(i != bad, "task {i} is bad")));
                    }))
                    .expect_err("the panic must be passed on");
                    assert_eq!(error.downcast_ref::<String>(), Some(&format!("task {bad} is bad")));
                    let count = AtomicU32::new(0);
                    pool.run(Isa::Scalar, |cx| {
                        cx.for_each_scratch(100, LARGE, 8, &|_, _| {
                            count.fetch_add(1, Ordering::Relaxed);
                        });
                    });
                    assert_eq!(count.load(Ordering::Relaxed), 100);
                }
            }
        }
    }

    #[test]
    fn scratch_is_aligned_private_and_kept() {
        for pool in pools() {
            pool.run(Isa::Scalar, |cx| {
                for len in [1, 1000, 10] {
                    cx.for_each_scratch(50, LARGE, len, &|i, scratch| {
                        assert_eq!((scratch.len(), scratch.as_ptr() as usize % 64), (len, 0));
                        scratch.fill(i as f32);
                        std::thread::yield_now();
                        assert!(scratch.iter().all(|&x| x == i as f32));
                    });
                }
                let address = || {
                    let seen = AtomicUsize::new(0);
                    cx.for_each_scratch(1, 0, 500, &|_, s| seen.store(s.as_ptr() as usize, Ordering::Relaxed));
                    seen.into_inner()
                };
                assert_eq!(address(), address());
            });
        }
    }

    #[test]
    fn workspaces_nest_and_are_kept() {
        let pool = Pool::new(1);
        let round = || {
            pool.run(Isa::Scalar, |cx| {
                cx.with_workspace(100, |a| {
                    a.fill(1.0);
                    let inner = cx.with_workspace(1000, |b| {
                        b.fill(2.0);
                        b.as_ptr() as usize
                    });
                    assert!(a.iter().all(|&x| x == 1.0));
                    assert_eq!(a.as_ptr() as usize % 64, 0);
                    (a.as_ptr() as usize, inner)
                })
            })
        };
        round();
        assert_eq!(round(), round());
    }

    #[test]
    fn a_cancelled_region_stops_early() {
        for pool in pools() {
            for cost in [0, LARGE] {
                let flag = pool.cancel_flag().clone();
                let count = AtomicU32::new(0);
                pool.run(Isa::Scalar, |cx| {
                    cx.for_each(1_000_000, cost, &|i| {
                        count.fetch_add(1, Ordering::Relaxed);
                        if i == 10 {
                            flag.cancel();
                        }
                    });
                    assert!(cx.cancelled());
                });
                assert!(count.load(Ordering::Relaxed) < 1_000_000);
                flag.reset();
            }
        }
    }

    #[test]
    fn concurrent_runs_share_a_pool() {
        let pool = Pool::new(3);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    pool.run(Isa::Scalar, |cx| {
                        for _ in 0..500 {
                            let sum = AtomicUsize::new(0);
                            cx.for_each_scratch(20, LARGE, 64, &|i, scratch| {
                                scratch.fill(i as f32);
                                sum.fetch_add(i, Ordering::Relaxed);
                                assert!(scratch.iter().all(|&x| x == i as f32));
                            });
                            assert_eq!(sum.into_inner(), 190);
                        }
                    });
                });
            }
        });
    }

    #[test]
    #[should_panic(expected = "5+6 of 10")]
    fn a_range_outside_the_slice_is_refused() {
        let mut data = [0; 10];
        let out = DisjointMut::new(&mut data);
        // SAFETY: nobody else uses the elements.
        let _ = unsafe { out.range(5, 6) };
    }
}
