/**
 * `weblane/quantize`: makes a model smaller and faster, in the page.
 *
 * ```ts
 * import { quantize } from "weblane/quantize";
 * const { model, report } = await quantize("/models/encoder.onnx", { mode: "dynamic" });
 * const session = await Session.load(model);
 * ```
 *
 * @packageDocumentation
 */
import type { Spawn } from "./environment.js";
import { abortError, toWeblaneError, WeblaneError } from "./errors.js";
import { encodeFeeds, type Feeds } from "./feeds.js";
import type { LoadProgress, Out, QuantizeProgress, QuantizeReport, QuantizerOptions } from "./protocol.js";
import { type Engine, type Runtime, type RuntimeOptions, startEngine, unlessAborted } from "./runtime.js";
import { type ExternalData, externalSource, sendFile } from "./session.js";
import type { ModelSource } from "./source.js";

export type { QuantizedNode, QuantizedOutput, QuantizeProgress, QuantizeReport } from "./protocol.js";

/** How {@link quantize} works. */
export interface QuantizeOptions extends RuntimeOptions {
  /**
   * `"dynamic"` (the default): products by constant weights in 8 bits, activations quantised as they come.
   * `"static"`: 8-bit operators with ranges from `calibration`. `"int4"` and `"int8-weights"`: weights only.
   * `"float16"`, `"float32"`: another precision.
   */
  readonly mode?: QuantizerOptions["mode"] | undefined;
  /**
   * Inputs of sample runs. Static quantisation takes the ranges of values from them; in every mode the outputs of both
   * models are compared on them.
   */
  readonly calibration?: readonly Feeds[] | undefined;
  /** Static: ranges from the least to the largest value (the default), of most values, or by divergence. */
  readonly method?: QuantizerOptions["method"] | undefined;
  /** Static, with `"percentile"`: share of values inside of the range, 99.99 by default. */
  readonly percentile?: number | undefined;
  /** Nodes that stay as they are; `*` and `?` match many. */
  readonly skipNodes?: readonly string[] | undefined;
  /** Operators that stay as they are. */
  readonly skipOps?: readonly string[] | undefined;
  /** Dynamic and static: one scale per channel of weights (the default) or per tensor. */
  readonly perChannel?: boolean | undefined;
  /** Dynamic and static: weights of 7 bits, for runtimes whose sums of 8-bit products saturate. This one is exact. */
  readonly reduceRange?: boolean | undefined;
  /** Whether tables that Gather reads become 8-bit too; they do by default. */
  readonly embeddings?: boolean | undefined;
  /** Weights that share a scale in `"int4"` and `"int8-weights"`: 16 to 256, 32 by default. */
  readonly blockSize?: number | undefined;
  /** `"int4"` and `"int8-weights"`: no zero points (the default). */
  readonly symmetric?: boolean | undefined;
  /** `"int4"` and `"int8-weights"`: how exact runtimes have to be: 0 (the default) their choice, 1 float32, 4 int8. */
  readonly accuracyLevel?: number | undefined;
  /** Static: int8 instead of uint8 activations. */
  readonly signedActivations?: boolean | undefined;
  /** Float16: inputs and outputs stay float32 (the default). */
  readonly keepIo?: boolean | undefined;
  /** Samples to compare the outputs on; all by default. */
  readonly compare?: number | undefined;
  /** The files that hold a model's weights when the model file does not. */
  readonly externalData?: ExternalData | undefined;
  /** Stops it. */
  readonly signal?: AbortSignal | undefined;
  /** Hears how far it has come: first of the load, then of the quantisation. */
  readonly onProgress?: ((progress: LoadProgress | QuantizeProgress) => void) | undefined;
  /** A worker to share with sessions. It decides threads, variant and wasmPaths. */
  readonly runtime?: Runtime | undefined;
}

/** What {@link quantize} gives. */
export interface Quantized {
  /** The bytes of the new `.onnx` file. */
  readonly model: Uint8Array<ArrayBuffer>;
  /** What became of the nodes and outputs. */
  readonly report: QuantizeReport;
}

const OPTIONS = [
  "skipNodes",
  "skipOps",
  "perChannel",
  "reduceRange",
  "embeddings",
  "blockSize",
  "symmetric",
  "accuracyLevel",
  "method",
  "percentile",
  "signedActivations",
  "keepIo",
  "compare",
] as const;

/**
 * Quantises a model in a worker.
 *
 * @throws WeblaneError `invalid_option` for options, `missing_input` when samples are needed and there are none,
 * `aborted`, and whatever loading a model can fail with
 */
export function quantize(source: ModelSource, options: QuantizeOptions = {}): Promise<Quantized> {
  return quantizeWith(source, options);
}

/** @internal Lets tests put a fake in the place of the worker. */
export async function quantizeWith(
  source: ModelSource,
  options: QuantizeOptions,
  spawn?: Spawn,
): Promise<Quantized> {
  const { signal, onProgress, runtime, threads, variant, wasmPaths } = options;
  if (runtime !== undefined && (threads ?? variant ?? wasmPaths) !== undefined) {
    throw new WeblaneError(
      "invalid_option",
      "threads, variant and wasmPaths belong to the runtime that was given",
    );
  }
  if (signal?.aborted) throw abortError(signal, "the quantisation");
  const engine = runtime?.engine ?? startEngine(options, onProgress, spawn);
  const id = engine.nextSession();
  let reason = new WeblaneError("disposed", "the quantisation has ended");
  try {
    return await unlessAborted(work(engine, id, source, options), signal, "the quantisation");
  } catch (error) {
    reason = toWeblaneError(error);
    throw reason;
  } finally {
    if (runtime === undefined) engine.client.close(reason);
    else engine.client.call("close", { session: id }).catch(() => {});
  }
}

async function work(
  engine: Engine,
  session: number,
  source: ModelSource,
  options: QuantizeOptions,
): Promise<Out<"quantize">> {
  const { client } = engine;
  const { signal, onProgress, externalData, calibration = [] } = options;
  const opened = client.call("openQuantizer", { session, options: engineOptions(options) }, { signal });
  const [, , url] = await Promise.all([
    engine.ready,
    opened,
    sendFile(engine, session, "", source, { signal, onProgress }),
  ]);
  for (const location of await client.call("quantizerExternals", { session }, { signal })) {
    const file = await externalSource(location, externalData, url);
    await sendFile(engine, session, location, file, { signal, onProgress });
  }
  const inputs = await client.call("sampleInputs", { session }, { signal });
  const wires = calibration.map((feeds) => encodeFeeds(inputs, feeds, false));
  return client.call(
    "quantize",
    { session, samples: wires.map((wire) => wire.inputs) },
    { signal, onProgress, transfer: wires.flatMap((wire) => wire.transfer) },
  );
}

function engineOptions(options: QuantizeOptions): QuantizerOptions {
  const given = OPTIONS.filter((name) => options[name] !== undefined);
  const chosen = Object.fromEntries(given.map((name) => [name, options[name]]));
  return { ...chosen, mode: options.mode ?? "dynamic" };
}
