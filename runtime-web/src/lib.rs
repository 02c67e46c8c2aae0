//! WebAssembly surface of weblane.
