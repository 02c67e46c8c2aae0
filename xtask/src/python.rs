//! The Python environment in which model recipes and conformance cases are made.

use crate::context::{Context, apt_install, hash_file, may_apt_install};
use anyhow::{Result, bail};
use std::path::PathBuf;

const REQUIREMENTS: &str = "models/requirements.txt";

/// The interpreter of `target/venv`, with the pinned requirements installed.
pub(crate) fn ensure(ctx: &Context) -> Result<PathBuf> {
    let python = ctx.path("target/venv/bin/python");
    let hash = hash_file(&ctx.path(REQUIREMENTS))?;
    if python.exists() && ctx.is_stamped("venv", &hash) {
        return Ok(python);
    }
    if !python.exists() {
        let create = |ctx: &Context| ctx.run(ctx.cmd("python3").args(["-m", "venv"]).arg(ctx.path("target/venv")));
        if create(ctx).is_err() {
            if !may_apt_install(ctx) {
                bail!("python3 with the venv module is missing; on Debian type: sudo apt-get install python3-venv");
            }
            apt_install(ctx, &["python3-venv"], "the Python environment")?;
            create(ctx)?;
        }
    }
    println!("   installing {REQUIREMENTS} into target/venv");
    let install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", REQUIREMENTS];
    ctx.run(ctx.cmd(&python).args(install))?;
    ctx.write_stamp("venv", &hash)?;
    Ok(python)
}
