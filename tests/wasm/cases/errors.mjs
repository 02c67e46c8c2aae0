/**
 * Wrong input: each kind ends in a WeblaneError with its code, and the session or page works afterwards.
 */
import { compare, decode } from "../page/compare.mjs";

const MODEL = "/target/models-test/digits/model.onnx";
const GOLDEN = "/target/models-test/digits/data.json";
const CUTS = 200;
/** Codes that a model cut short may have: it depends on what the cut went through. */
const CUT_CODES = ["empty_model", "not_onnx", "truncated_model", "invalid_model", "unsupported_operator"];

/** The start of a JPEG file, as someone might drop into the page. */
function jpeg() {
  const bytes = new Uint8Array(20_000);
  // A linear congruential generator: the same bytes in every engine.
  let state = 1;
  for (let i = 0; i < bytes.length; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    bytes[i] = state >>> 24;
  }
  bytes.set([0xff, 0xd8, 0xff, 0xe0, 0, 16, 0x4a, 0x46, 0x49, 0x46, 0, 1, 1]);
  return bytes;
}

/** The model with operator names replaced by others of the same length. */
function withOperators(model, names) {
  const copy = model.slice();
  for (const [from, to] of Object.entries(names)) {
    const pattern = new TextEncoder().encode(from);
    let found = 0;
    for (let i = 0; i + pattern.length <= copy.length; i++) {
      if (pattern.every((byte, j) => copy[i + j] === byte)) {
        copy.set(new TextEncoder().encode(to), i);
        found++;
      }
    }
    if (!found) throw new Error(`the model has no ${from}`);
  }
  return copy;
}

export default async (ctx) => {
  const { Session, Runtime } = ctx.weblane;
  const model = await ctx.fetchBytes(MODEL);
  const golden = await ctx.fetchJson(GOLDEN);
  const [input] = golden.inputs;
  const [output] = golden.outputs;
  const [set] = golden.sets;

  const works = async (session) => {
    const result = await session.run({ [input]: decode(set.inputs[0]) });
    compare(result[output], decode(set.outputs[0]), golden, output);
  };

  /** Loads bytes that must be refused, then a good model in the same runtime. */
  const refused = (name, bytes, code, check = () => {}) => ({
    name,
    timeout: 30,
    async run() {
      await withResource(await Runtime.create(), async (runtime) => {
        const error = await ctx.rejects(Session.load(bytes(), { runtime }), code);
        check(error);
        await works(await Session.load(model.slice(), { runtime }));
        return error.message;
      });
    },
  });

  /** Feeds that must be refused, then good ones in the same session. */
  const badFeeds = (name, feeds, code, check = () => {}) => ({
    name,
    timeout: 30,
    run: async () =>
      withResource(await Session.load(model.slice()), async (session) => {
        const error = await ctx.rejects(session.run(feeds()), code);
        check(error);
        await works(session);
        return error.message;
      }),
  });

  const good = () => decode(set.inputs[0]);
  const names = (error, ...words) => {
    for (const word of words)
      ctx.assert(error.message.includes(word), `"${error.message}" does not name ${word}`);
  };

  return [
    refused("an empty file", () => new Uint8Array(0), "empty_model"),
    refused("a JPEG file", jpeg, "not_onnx"),
    refused(
      "operators that do not exist, all named at once",
      () => withOperators(model, { MaxPool: "Pooling", Softmax: "Hardmap" }),
      "unsupported_operator",
      (error) => names(error, "Pooling", "Hardmap"),
    ),
    {
      name: `a model cut at ${CUTS} places`,
      timeout: 200,
      async run() {
        await withResource(await Runtime.create(), async (runtime) => {
          for (let i = 0; i < CUTS; i++) {
            // Close together at the start, where the structure is, and spread over the rest.
            const at = i < 50 ? i : Math.floor(((i - 49) * (model.length - 1)) / (CUTS - 49));
            try {
              const session = await Session.load(model.slice(0, at), { runtime });
              await session.dispose();
            } catch (error) {
              ctx.assert(error instanceof ctx.weblane.WeblaneError, `cut at ${at}: ${error}`);
              ctx.assert(CUT_CODES.includes(error.code), `cut at ${at}: ${error.code}: ${error.message}`);
              continue;
            }
            throw new Error(`a model cut at ${at} of ${model.length} bytes was accepted`);
          }
          await works(await Session.load(model.slice(), { runtime }));
        });
      },
    },
    badFeeds(
      "an input of the wrong element type",
      () => ({ [input]: { type: "int32", dims: good().dims, data: new Int32Array(good().data.length) } }),
      "type_mismatch",
      (error) => names(error, input),
    ),
    badFeeds(
      "an input of the wrong shape",
      () => ({ [input]: { type: "float32", dims: [3, 5], data: new Float32Array(15) } }),
      "shape_mismatch",
      (error) => names(error, input),
    ),
    badFeeds(
      "a missing input",
      () => ({}),
      "missing_input",
      (error) => names(error, input),
    ),
    badFeeds(
      "an input that the model does not have",
      () => ({ [input]: good(), nothing: good() }),
      "unknown_input",
      (error) => names(error, "nothing"),
    ),
    {
      name: "a file that is not there",
      timeout: 30,
      run: () =>
        ctx.rejects(Session.load(ctx.url("/target/models-test/none/model.onnx")), "network").then(() => {}),
    },
    {
      name: "a page in the place of a model, with a worker that is still starting and one that runs",
      timeout: 30,
      async run() {
        const load = (options) => Session.load(ctx.url("/index.html"), options);
        const named = (error) => ctx.assert(error.message.includes("HTML page"), error.message);
        named(await ctx.rejects(load(), "not_onnx"));
        await withResource(await Runtime.create(), async (runtime) => {
          named(await ctx.rejects(load({ runtime }), "not_onnx"));
          await works(await Session.load(ctx.url(MODEL), { runtime }));
        });
      },
    },
    {
      name: "a session that was disposed of",
      timeout: 30,
      async run() {
        const session = await Session.load(model.slice());
        await session.dispose();
        await session.dispose();
        await ctx.rejects(session.run({ [input]: good() }), "disposed");
      },
    },
    {
      name: "a load that was called off",
      timeout: 30,
      async run() {
        const controller = new AbortController();
        const load = Session.load(ctx.url(MODEL), { signal: controller.signal });
        controller.abort();
        await ctx.rejects(load, "aborted");
      },
    },
  ];
};

/** Disposes of a resource whatever happens. */
async function withResource(resource, use) {
  try {
    return await use(resource);
  } finally {
    await resource.dispose();
  }
}
