//! Node and the packages of the project's own npm directories.

use crate::context::{Context, hash_file};
use anyhow::{Context as _, Result, bail};

/// Lowest version of Node that every tool of the project runs on.
const MINIMUM: (u32, u32) = (20, 16);

/// Checks that node and npm are there and new enough.
pub(crate) fn ensure(ctx: &Context) -> Result<()> {
    let hint = "install Node 20.16 or newer from https://nodejs.org or your package manager";
    let text = ctx.output(ctx.cmd("node").arg("--version")).with_context(|| format!("node does not run; {hint}"))?;
    let mut parts = text.trim_start_matches('v').split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    if version < MINIMUM {
        bail!("node is {text}; {hint}");
    }
    if ctx.find_program("npm").is_none() {
        bail!("npm is not on the PATH; {hint}");
    }
    Ok(())
}

/// Installs what the lock file of a directory pins, when it changed since the last time.
///
/// Not `npm ci`: that refuses a lock file made where the registry lacked optional packages of other
/// platforms, while `install --no-save` takes the same pinned versions and leaves the file alone.
pub(crate) fn install(ctx: &Context, directory: &str) -> Result<()> {
    let lock = ctx.path(directory).join("package-lock.json");
    let name = format!("npm-{directory}");
    let hash = format!(
        "{} {}",
        hash_file(&ctx.path(directory).join("package.json"))?,
        if lock.exists() { hash_file(&lock)? } else { String::new() }
    );
    if ctx.path(directory).join("node_modules").is_dir() && ctx.is_stamped(&name, &hash) {
        return Ok(());
    }
    println!("   npm packages of {directory}/");
    ctx.run_in(directory, |ctx| {
        ctx.cmd("npm").args(["install", "--no-save", "--no-audit", "--no-fund", "--loglevel=error"])
    })?;
    ctx.write_stamp(&name, &hash)
}

/// Runs a script of a package.
pub(crate) fn script(ctx: &Context, directory: &str, script: &str) -> Result<()> {
    ctx.run_in(directory, |ctx| ctx.cmd("npm").args(["run", "--silent", script]))
}

/// Whether a package defines a script.
pub(crate) fn has_script(ctx: &Context, directory: &str, script: &str) -> Result<bool> {
    let text = std::fs::read_to_string(ctx.path(directory).join("package.json"))
        .with_context(|| format!("cannot read {directory}/package.json"))?;
    let package: serde_json::Value = serde_json::from_str(&text)?;
    Ok(package["scripts"][script].is_string())
}
