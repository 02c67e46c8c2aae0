//! `cargo xtask setup`: everything the other commands need, in parts.

use crate::browsers::{self, Browser};
use crate::context::{Context, timed};
use crate::{node, python, toolchain};
use anyhow::{Result, bail};
use clap::ValueEnum;

/// A part of the set-up.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Part {
    /// Wasm toolchain, wasm-bindgen, wasm-pack
    Rust,
    /// Node packages, wasm-opt among them
    Node,
    /// Chromium, Firefox, WebKit
    Browsers,
    /// target/venv for model recipes
    Python,
}

/// Runs the parts asked for, or all.
pub(crate) fn run(ctx: &Context, only: &[Part]) -> Result<()> {
    let wanted = |part| only.is_empty() || only.contains(&part);
    if wanted(Part::Rust) {
        timed("Rust toolchain for WebAssembly", || {
            toolchain::ensure(ctx)?;
            toolchain::ensure_wasm_tools(ctx).map(drop)
        })?;
    }
    if wanted(Part::Node) {
        timed("Node packages", || node_packages(ctx))?;
    }
    if wanted(Part::Python) {
        timed("Python environment", || {
            python::ensure(ctx)?;
            Ok(())
        })?;
    }
    if wanted(Part::Browsers) {
        timed("Browsers", || every_browser(ctx))?;
    }
    println!("\nset-up is complete");
    Ok(())
}

fn node_packages(ctx: &Context) -> Result<()> {
    node::ensure(ctx)?;
    for directory in ["xtask/node", "tests/wasm", "npm", "demo-site"] {
        if ctx.path(directory).join("package.json").exists() {
            node::install(ctx, directory)?;
        }
    }
    Ok(())
}

fn every_browser(ctx: &Context) -> Result<()> {
    let mut missing = Vec::new();
    for browser in [Browser::Chromium, Browser::Firefox, Browser::Webkit] {
        match browsers::ensure(ctx, browser) {
            Ok(found) => {
                for (_, path) in found.environment() {
                    println!("   {}: {}", browser.name(), path.display());
                }
            }
            Err(error) => missing.push(format!("{}: {error:#}", browser.name())),
        }
    }
    if missing.is_empty() { Ok(()) } else { bail!("browsers are missing\n{}", missing.join("\n")) }
}
