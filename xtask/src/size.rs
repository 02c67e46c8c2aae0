//! The size of the shipped modules and the budget that bounds it.

use crate::build::Variant;
use crate::context::Context;
use anyhow::{Context as _, Result, bail};
use std::fs;
use std::path::PathBuf;

const BUDGET: &str = "benches/size-budget.json";

/// Bytes of a module as it lies on disk and as a server with brotli sends it.
struct Size {
    bytes: u64,
    brotli: u64,
}

/// Prints the sizes of modules on disk; compressing them takes seconds, so only the budget does that.
pub(crate) fn report(ctx: &Context, variants: &[Variant]) -> Result<()> {
    for variant in variants {
        let bytes = fs::metadata(variant.output(ctx))?.len();
        println!("   weblane_{}.wasm: {bytes} bytes", variant.name());
    }
    Ok(())
}

/// Fails when a module is over the budget.
pub(crate) fn check(ctx: &Context) -> Result<()> {
    let text = fs::read_to_string(ctx.path(BUDGET)).with_context(|| format!("cannot read {BUDGET}"))?;
    let budget: serde_json::Value = serde_json::from_str(&text)?;
    let limit = |key: &str| budget["wasm"][key].as_u64().with_context(|| format!("{BUDGET} has no number wasm.{key}"));
    let (bytes, brotli) = (limit("bytes")?, limit("brotli")?);
    let mut over = Vec::new();
    for (variant, size) in Variant::ALL.into_iter().zip(measure(ctx)?) {
        let name = variant.name();
        println!("   {name}: {} of {bytes} bytes, {} of {brotli} brotli", size.bytes, size.brotli);
        if size.bytes > bytes || size.brotli > brotli {
            over.push(name);
        }
    }
    if over.is_empty() { Ok(()) } else { bail!("over the budget of {BUDGET}: {}", over.join(", ")) }
}

/// The sizes of all variants.
fn measure(ctx: &Context) -> Result<Vec<Size>> {
    // Node has brotli built in, and compresses on several threads; window and quality are what servers use for static files.
    let program = "const fs = require('fs'), z = require('zlib');\
        const o = { params: { [z.constants.BROTLI_PARAM_QUALITY]: 11, [z.constants.BROTLI_PARAM_LGWIN]: 22 } };\
        const size = (path) => require('util').promisify(z.brotliCompress)(fs.readFileSync(path), o);\
        Promise.all(process.argv.slice(1).map(size)).then((all) => console.log(all.map((b) => b.length).join(' ')));";
    let paths = Variant::ALL.map(|variant| variant.output(ctx));
    let bytes = |path: &PathBuf| {
        fs::metadata(path).map(|file| file.len()).with_context(|| format!("{} is not built", path.display()))
    };
    let bytes: Vec<u64> = paths.iter().map(bytes).collect::<Result<_>>()?;
    let text =
        ctx.output(ctx.cmd("node").args(["-e", program]).args(&paths)).context("node cannot compress the modules")?;
    let brotli: Vec<u64> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    if brotli.len() != bytes.len() {
        bail!("node answered {text:?} for {} modules", bytes.len());
    }
    Ok(bytes.into_iter().zip(brotli).map(|(bytes, brotli)| Size { bytes, brotli }).collect())
}
