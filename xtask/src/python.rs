//! The Python environments in which models and conformance cases are made.

use crate::context::{Context, apt_install, hash_file, may_apt_install};
use anyhow::{Result, bail};
use std::path::PathBuf;

/// An environment: its directory and the pinned requirements that it holds.
struct Environment {
    directory: &'static str,
    requirements: &'static str,
}

const MODELS: Environment = Environment { directory: "target/venv", requirements: "models/requirements.txt" };
/// TensorFlow pins other versions of what the recipes use, and only one bench needs it.
const TFLITE: Environment =
    Environment { directory: "target/venv-tflite", requirements: "models/requirements-tflite.txt" };

/// The interpreter of `target/venv`, with the pinned requirements installed.
pub(crate) fn ensure(ctx: &Context) -> Result<PathBuf> {
    MODELS.ensure(ctx)
}

/// The interpreter of `target/venv-tflite`, with TensorFlow.
pub(crate) fn ensure_tflite(ctx: &Context) -> Result<PathBuf> {
    TFLITE.ensure(ctx)
}

impl Environment {
    fn ensure(&self, ctx: &Context) -> Result<PathBuf> {
        let Self { directory, requirements } = self;
        let python = ctx.path(directory).join("bin/python");
        let hash = hash_file(&ctx.path(requirements))?;
        let stamp = directory.trim_start_matches("target/");
        if python.exists() && ctx.is_stamped(stamp, &hash) {
            return Ok(python);
        }
        if !python.exists() {
            let create = |ctx: &Context| ctx.run(ctx.cmd("python3").args(["-m", "venv"]).arg(ctx.path(directory)));
            if create(ctx).is_err() {
                if !may_apt_install(ctx) {
                    bail!("python3 with the venv module is missing; on Debian type: sudo apt-get install python3-venv");
                }
                apt_install(ctx, &["python3-venv"], "the Python environment")?;
                create(ctx)?;
            }
        }
        println!("   installing {requirements} into {directory}");
        let install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", requirements];
        ctx.run(ctx.cmd(&python).args(install))?;
        ctx.write_stamp(stamp, &hash)?;
        Ok(python)
    }
}
