/**
 * Entry of the worker: the engine's worker by default, a thread of its pool when the first message offers a seat.
 */
import relaxedMt from "glue:relaxed_mt";
import relaxedSt from "glue:relaxed_st";
import simdMt from "glue:simd_mt";
import simdSt from "glue:simd_st";
import { compileBuild } from "./builds.js";
import { download, READ_BYTES } from "./download.js";
import { nodeModule, openNodeFile } from "./environment.js";
import { toWeblaneError, WeblaneError } from "./errors.js";
import { describeTrap, Host } from "./host.js";
import { onPoolWanted } from "./pool.js";
import type { FromWorker, PoolSeat, ToWorker } from "./protocol.js";
import { detectPlatform, type Variant } from "./variant.js";
import type { Glue, Wasm } from "./wasm.js";

/** wasm-bindgen's module of each build that is part of this package. */
const GLUE: Readonly<Record<Variant, Glue | null>> = {
  simd_st: simdSt,
  simd_mt: simdMt,
  relaxed_st: relaxedSt,
  relaxed_mt: relaxedMt,
};

const nodePort = nodeModule("node:worker_threads")?.parentPort;
const page = (nodePort ?? globalThis) as {
  postMessage(message: FromWorker, transfer?: readonly Transferable[]): void;
};

function glueOf(variant: Variant): Glue {
  const glue = GLUE[variant];
  if (glue === null)
    throw new WeblaneError("unsupported_platform", `the build ${variant} is not part of this package`);
  return glue;
}

let onSpawned!: (outcome: true | string) => void;
/** Whether the page could start the workers of the pool. */
const spawned = new Promise<void>((resolve, reject) => {
  onSpawned = (outcome) =>
    outcome === true ? resolve() : reject(new WeblaneError("unsupported_platform", outcome));
});
// Nobody may be waiting for them.
spawned.catch(() => {});
let onSeated!: () => void;
/** All of them sit. */
const seated = new Promise<void>((resolve) => {
  onSeated = resolve;
});

let onCompiled!: (module: WebAssembly.Module | undefined) => void;
/** What the page has made of the build that it compiles early. */
const compiledByPage = new Promise<WebAssembly.Module | undefined>((resolve) => {
  onCompiled = resolve;
});

const host = new Host({
  platform: detectPlatform(),
  post: (message, transfer) => page.postMessage(message, transfer),
  breathe,
  open: openFile,

  async instantiate(variant, url, helpers, early): Promise<Wasm> {
    const glue = glueOf(variant);
    // The pool's workers load their script while this one compiles.
    if (helpers > 0) page.postMessage({ hire: helpers });
    let memory: WebAssembly.Memory;
    try {
      if (variant.endsWith("_mt")) avoidBaselineCompiler();
      const module = (early ? await compiledByPage : undefined) ?? (await compileBuild(variant, url));
      ({ memory } = await instantiate(glue, module));
    } catch (error) {
      if (helpers > 0) page.postMessage({ hire: 0 });
      throw error;
    }
    onPoolWanted((module, memory, receiver, count) => {
      page.postMessage({ spawn: { seat: { variant, module, memory, receiver }, count } });
      return seated;
    });
    return {
      memory,
      startPool: glue.startPool,
      async startHelpers(count) {
        glue.initThreadPool?.(count).then(
          () => glue.startHelpers(),
          (error: unknown) => {
            // As an error that nobody catches the page hears of it.
            setTimeout(() => {
              throw error;
            });
          },
        );
        await spawned;
      },
      WasmSession: glue.WasmSession,
      WasmQuantizer: glue.WasmQuantizer,
      readKept: glue.readKept,
      releaseKept: glue.releaseKept,
      version: glue.version,
      stopWord: glue.stopWord,
      runningWord: glue.runningWord,
      lastFailure: glue.lastFailure,
    };
  },
});

function receive(message: ToWorker): void {
  if ("seat" in message) void sit(message.seat);
  else if ("spawned" in message) onSpawned(message.spawned);
  else if ("seated" in message) onSeated();
  else if ("compiled" in message) onCompiled(message.compiled);
  else if ("cancel" in message) host.cancel(message.cancel);
  else void host.handle(message);
}

if (nodePort) nodePort.on("message", (message) => receive(message as ToWorker));
else globalThis.onmessage = (event: MessageEvent<ToWorker>) => receive(event.data);

/** Works for the pool until the page ends this worker. */
async function sit({ variant, module, memory, receiver }: PoolSeat): Promise<void> {
  let glue: Glue | undefined;
  try {
    glue = glueOf(variant);
    await glue.default({ module_or_path: module, memory });
    page.postMessage({ sits: true });
    glue.wbg_rayon_start_worker?.(receiver);
  } catch (error) {
    page.postMessage({ crash: describeTrap(error, glue?.lastFailure()).toJSON() });
  }
}

async function instantiate(glue: Glue, module: WebAssembly.Module): Promise<{ memory: WebAssembly.Memory }> {
  try {
    return await glue.default({ module_or_path: module });
  } catch (error) {
    // A refused WebAssembly.Memory is a RangeError.
    const code = error instanceof RangeError ? "out_of_memory" : "unsupported_platform";
    throw toWeblaneError(error, code, "the WebAssembly build could not be started: ");
  }
}

/**
 * The baseline compiler of V8 11 (Node.js 20) miscompiles the compare-and-exchange loop in which a thread waits to be
 * woken: the word says that it was, and the loop goes on for ever. Seen in one start of three; never with the
 * optimising compiler, nor in V8 15.
 */
function avoidBaselineCompiler(): void {
  const { process } = globalThis as { process?: { versions?: { v8?: string } } };
  if (Number.parseInt(process?.versions?.v8 ?? "", 10) < 12) {
    nodeModule("node:v8")?.setFlagsFromString("--no-liftoff");
  }
}

async function openFile(url: string, signal: AbortSignal) {
  if (url.startsWith("file:") && nodePort) return openNodeFile(new URL(url));
  // One buffer serves all reads: chunks of their own would pile up as garbage until the collector looks.
  let last: ArrayBuffer | undefined;
  const opened = await download(url, signal, () => last ?? new ArrayBuffer(READ_BYTES));
  return {
    ...opened,
    chunks: (async function* () {
      for await (const chunk of opened.chunks) {
        yield chunk;
        last = chunk.buffer;
      }
    })(),
  };
}

/** One turn of the event loop. Timers would do, but browsers stretch nested ones to 4 ms. */
function breathe(): Promise<void> {
  const { setImmediate } = globalThis as { setImmediate?: (callback: () => void) => void };
  if (setImmediate) return new Promise((resolve) => setImmediate(resolve));
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}
