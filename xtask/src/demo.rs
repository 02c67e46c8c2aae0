//! `cargo xtask demo`: the demo site on a local address, or used once by headless Chromium.

use crate::browsers::{self, Browser};
use crate::build::{self, BuildArgs};
use crate::context::{Context, timed};
use crate::{node, setup};
use anyhow::Result;
use clap::Args;

#[derive(Args)]
pub(crate) struct DemoArgs {
    /// Port to serve on; 0 takes a free one
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// Let headless Chromium use the page, then end
    #[arg(long)]
    check: bool,
}

/// Builds everything the site needs and serves it.
pub(crate) fn run(ctx: &Context, args: &DemoArgs) -> Result<()> {
    setup::run(ctx, &[setup::Part::Rust, setup::Part::Node, setup::Part::Python])?;
    build::run(ctx, &BuildArgs::with_site())?;
    if args.check {
        return check(ctx);
    }
    let serve = ctx.cmd("node").args(["tests/wasm/serve.mjs", "--port", &args.port.to_string(), "demo-site/dist"]);
    ctx.run(serve)
}

/// Headless Chromium asks page one a question and must get an answer. The site must be built.
pub(crate) fn check(ctx: &Context) -> Result<()> {
    node::install(ctx, "tests/wasm")?;
    let found = browsers::ensure(ctx, Browser::Chromium)?;
    timed("demo check", || {
        let mut command = ctx.cmd("node").args(["tests/wasm/demo-check.mjs", "demo-site/dist"]);
        for (key, value) in found.environment() {
            command = command.env(key, value);
        }
        ctx.run(command)
    })
}
