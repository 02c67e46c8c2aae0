//! Threads: how a kernel spreads its work.
//!
//! A kernel cuts its work into tasks that write disjoint parts of the output and hands them to [`Cx::for_each`]. The cut
//! depends on sizes alone, never on the number of threads, so that results are the same bits for any number of them.
