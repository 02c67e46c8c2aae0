//! What went wrong, in a form that crosses to JavaScript: errors of the engine, and what is left of a panic.

use serde::Serialize;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use weblane_engine::{Error, ErrorCode};

/// See `ErrorShape` in `npm/src/errors.ts`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Failure {
    code: &'static str,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    op: Option<String>,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        // Display names the place too, which a person wants to see in the message.
        let message = error.to_string();
        Failure { code: error.code.as_str(), message, node: error.node, op: error.op }
    }
}

/// The message of the first panic of any thread. Panics abort, so there is no second one worth knowing.
static PANIC: Mutex<Option<String>> = Mutex::new(None);
/// Bytes of the last allocation that was refused; 0 when none was since the last foreseen error.
static REFUSED: AtomicUsize = AtomicUsize::new(0);

/// Keeps the text of a panic for [`last`]; debug builds also print it with a stack trace.
pub(crate) fn install_hook() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        std::panic::set_hook(Box::new(|info| {
            PANIC.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| info.to_string());
            #[cfg(all(debug_assertions, target_arch = "wasm32"))]
            console_error_panic_hook::hook(info);
        }));
    });
}

/// An error that the engine foresaw: a refused allocation before it is no explanation of a later trap.
pub(crate) fn forget_refused_allocation() {
    REFUSED.store(0, Ordering::Relaxed);
}

/// What explains a trap, if anything does.
pub(crate) fn last() -> Option<Failure> {
    let of = |code: ErrorCode, message| Failure { code: code.as_str(), message, node: None, op: None };
    if let Some(panic) = PANIC.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
        return Some(of(ErrorCode::Internal, panic.clone()));
    }
    let bytes = REFUSED.load(Ordering::Relaxed);
    (bytes > 0).then(|| of(ErrorCode::OutOfMemory, format!("{bytes} bytes could not be allocated")))
}

/// The standard allocator, which says nothing when it refuses: the abort that follows is a bare trap.
struct Remembering;

#[global_allocator]
static ALLOCATOR: Remembering = Remembering;

fn remember(ptr: *mut u8, bytes: usize) -> *mut u8 {
    if ptr.is_null() {
        REFUSED.store(bytes, Ordering::Relaxed);
    }
    ptr
}

// SAFETY: every method hands on to `System` with the arguments it got and returns what `System` returned.
unsafe impl GlobalAlloc for Remembering {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `GlobalAlloc::alloc`, which is the same.
        remember(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as in `alloc`.
        remember(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as in `alloc`.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: as in `alloc`.
        remember(unsafe { System.realloc(ptr, layout, new_size) }, new_size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_allocation_explains_a_trap_until_it_is_forgotten() {
        assert_eq!(last(), None);
        assert!(Vec::<u8>::new().try_reserve_exact(isize::MAX as usize).is_err());
        let failure = last().expect("the allocation was refused");
        assert_eq!(failure.code, "out_of_memory");
        assert!(failure.message.starts_with("9223372036854775807 bytes"), "{}", failure.message);
        forget_refused_allocation();
        assert_eq!(last(), None);
    }

    #[test]
    fn an_error_names_its_place_in_the_message() {
        let failure = Failure::from(Error::shape("a must be 3").at("conv1", "Conv"));
        assert_eq!(failure.code, "shape_mismatch");
        assert_eq!(failure.message, "Conv \"conv1\": a must be 3");
        assert_eq!((failure.node.as_deref(), failure.op.as_deref()), (Some("conv1"), Some("Conv")));
    }
}
