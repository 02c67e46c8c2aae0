//! The native program `weblane`.
fn main() { println!("weblane {}", env!("CARGO_PKG_VERSION")); }
