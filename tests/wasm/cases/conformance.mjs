/**
 * ONNX's own backend cases, as models/export_conformance.py writes them. All share one runtime, so that a case costs a
 * message and not a worker.
 */
import { compare, decode } from "../page/compare.mjs";

const CASES = "/target/conformance";

/** A runtime that earlier cases left working, or a new one. */
async function runtime(ctx) {
  if (!ctx.shared.has("runtime")) ctx.shared.set("runtime", await ctx.weblane.Runtime.create());
  return ctx.shared.get("runtime");
}

function tensorOf(value) {
  if (value.kind === "tensor") return decode(value);
  throw new Error(`${value.name} is a ${value.kind}, which the API does not have`);
}

async function run(ctx, { path }) {
  const { sets, rtol, atol } = await ctx.fetchJson(`${CASES}/${path}/case.json`);
  const feeds = sets.map(({ inputs }) =>
    Object.fromEntries(inputs.filter((value) => value.name).map((value) => [value.name, tensorOf(value)])),
  );
  const wanted = sets.map(({ outputs }) => outputs.map((value) => ({ ...value, tensor: tensorOf(value) })));
  const session = await ctx.weblane.Session.load(ctx.url(`${CASES}/${path}/model.onnx`), {
    runtime: await runtime(ctx),
    externalData: (location) => ctx.url(`${CASES}/${path}/${location}`),
  });
  try {
    for (const [i, feed] of feeds.entries()) {
      const outputs = await session.run(feed);
      ctx.equal(Object.keys(outputs).length, wanted[i].length, "number of outputs");
      for (const { name, tensor, rtol: own } of wanted[i]) {
        compare(outputs[name], tensor, { rtol: own ?? rtol, atol }, name);
      }
    }
  } finally {
    await session.dispose();
  }
}

export default async (ctx) => {
  const index = await ctx.fetchJson(`${CASES}/index.json`);
  return index.map((entry) => ({
    name: `${entry.kind}/${entry.name}`,
    timeout: 30,
    async run() {
      try {
        await run(ctx, entry);
      } catch (error) {
        // After a trap the module's state is anyone's guess.
        if (error.code === "internal" || error.code === "out_of_memory") {
          const broken = ctx.shared.get("runtime");
          ctx.shared.delete("runtime");
          await broken?.dispose();
        }
        throw error;
      }
    },
  }));
};
