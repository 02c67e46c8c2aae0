//! Arbitrary bytes as a model: loading must end in a session or an error, never a panic, and the chunks in which
//! the bytes arrive must not matter.
//!
//! `cargo xtask fuzz model --seconds 300`

#![no_main]

use libfuzzer_sys::fuzz_target;
use weblane_engine::{Loader, Options, Result, Session};

fn load(bytes: &[u8], chunk: usize) -> Result<Session> {
    let mut loader = Loader::new(Options::default());
    for part in bytes.chunks(chunk.max(1)) {
        loader.push(part)?;
    }
    let (model, options) = loader.finish()?;
    Session::new(model, options)
}

fuzz_target!(|input: (u8, &[u8])| {
    let (chunk, bytes) = input;
    let whole = load(bytes, bytes.len()).map(drop).map_err(|error| error.code);
    let parts = load(bytes, usize::from(chunk)).map(drop).map_err(|error| error.code);
    assert_eq!(whole, parts, "chunks of {chunk} bytes gave another result");
});
