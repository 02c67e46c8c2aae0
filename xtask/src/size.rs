//! The size of the shipped modules and the budget that bounds it.

use crate::build::Variant;
use crate::context::Context;
use anyhow::{Context as _, Result, bail};
use std::fs;

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
    for variant in Variant::ALL {
        let size = measure(ctx, variant)?;
        let name = variant.name();
        println!("   {name}: {} of {bytes} bytes, {} of {brotli} brotli", size.bytes, size.brotli);
        if size.bytes > bytes || size.brotli > brotli {
            over.push(name);
        }
    }
    if over.is_empty() { Ok(()) } else { bail!("over the budget of {BUDGET}: {}", over.join(", ")) }
}

fn measure(ctx: &Context, variant: Variant) -> Result<Size> {
    let path = variant.output(ctx);
    let bytes = fs::metadata(&path).with_context(|| format!("{} is not built", path.display()))?.len();
    // Node has brotli built in; window and quality are what servers use for static files.
    let program = "const fs = require('fs'), z = require('zlib');\
        const b = fs.readFileSync(process.argv[1]);\
        const o = { params: { [z.constants.BROTLI_PARAM_QUALITY]: 11, [z.constants.BROTLI_PARAM_LGWIN]: 22 } };\
        console.log(z.brotliCompressSync(b, o).length);";
    let text =
        ctx.output(ctx.cmd("node").args(["-e", program]).arg(&path)).context("node cannot compress the module")?;
    Ok(Size { bytes, brotli: text.parse()? })
}
