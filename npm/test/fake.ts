/**
 * A fake engine behind the real host, reached through the real client: everything but the worker and the WebAssembly.
 * Its only model has the inputs x: float32[2, 3] and n: int64[batch], and gives back what it gets.
 */
import type { Port, PortEvents, Spawn } from "../src/environment.js";
import type { ErrorShape } from "../src/errors.js";
import { Host, type HostEnvironment } from "../src/host.js";
import type { ModelInfo, NodeTiming, QuantizeReport, ToWorker } from "../src/protocol.js";
import type { Platform } from "../src/variant.js";
import type { Wasm, WasmOutput, WasmQuantizer, WasmSession } from "../src/wasm.js";

export const MODEL: ModelInfo = {
  inputs: [
    { name: "x", type: "float32", dims: [2, 3] },
    { name: "n", type: "int64", dims: ["batch"] },
  ],
  outputs: [
    { name: "y", type: "float32", dims: [2, 3] },
    { name: "m", type: "int64", dims: ["batch"] },
  ],
  opset: 17,
  operators: { Identity: 2 },
  producer: "fake",
  nodes: 2,
  weightBytes: 0,
};

/** What a profile of the fake engine says. */
export const TIMING: NodeTiming = {
  node: "a",
  op: "Identity",
  kernel: "copy",
  startMs: 0.25,
  ms: 0.5,
  flops: 1e6,
  readBytes: 24,
  writtenBytes: 24,
};

/** What the fake quantiser says; its model is what it got, backwards. */
export const REPORT: QuantizeReport = {
  mode: "dynamic",
  nodes: [],
  skipped: [],
  outputs: [],
  samples: 0,
  bytesBefore: 3,
  bytesAfter: 3,
};

/** Steers what the fake engine does. */
export interface Script {
  /** Steps that a run takes. */
  steps: number;
  /** Thrown by the next `advance`. */
  fail?: unknown;
  /** Locations of external data that the model names. */
  externals: string[];
  /** Said by `lastFailure`. */
  said?: ErrorShape;
  /** Fails the start. */
  startError?: unknown;
  /** The start waits for it. */
  starting?: Promise<unknown>;
  /** A build with threads starts: helpers as well, or not, for this reason. Without this there is no such build. */
  pool?: true | string;
  /** Files by address, for `fetch`. */
  files: Record<string, Uint8Array>;
  /** The chunks of every file, instead of all of it at once. */
  chunks?: () => AsyncIterable<Uint8Array>;
  html?: boolean;
}

export class FakeEngine {
  readonly script: Script = { steps: 1, externals: [], files: {} };
  readonly log: string[] = [];
  readonly received = new Map<string, Buffer>();
  platform: Platform = { simd: true, relaxedSimd: true, sharedMemory: false, isolated: false, processors: 4 };
  terminated = 0;
  keptAlive = false;
  #events: PortEvents | undefined;

  /** Crashes the worker. */
  crash(text: string): void {
    this.#events?.onFailure(text, "internal");
  }

  /** For `Session.loadWith` and `startEngine`. */
  readonly spawn: Spawn = (events): Port => {
    this.#events = events;
    const host = new Host(this.#environment(events));
    let open = true;
    return {
      post: (message, transfer) => {
        // Structured cloning is what makes a real message differ from a call.
        const copy = structuredClone(message, {
          transfer: [...(transfer ?? [])] as ArrayBuffer[],
        }) as ToWorker;
        queueMicrotask(() => {
          if (!open) return;
          if ("cancel" in copy) host.cancel(copy.cancel);
          else if ("method" in copy) void host.handle(copy);
        });
      },
      keepAlive: (on) => {
        this.keptAlive = on;
      },
      terminate: () => {
        open = false;
        this.terminated++;
      },
    };
  };

  #environment(events: PortEvents): HostEnvironment {
    return {
      platform: this.platform,
      instantiate: async (variant, url, helpers) => {
        this.log.push(`instantiate ${variant} ${url ?? ""}`.trim());
        if (helpers > 0) this.log.push(`hire ${helpers}`);
        if (this.script.startError !== undefined) throw this.script.startError;
        await this.script.starting;
        if (variant.endsWith("_mt") && this.script.pool === undefined)
          throw { code: "out_of_memory", message: "no shared memory" };
        return this.#wasm();
      },
      open: async (url) => {
        const file = this.script.files[url];
        if (file === undefined) throw { code: "network", message: `${url} is not there` };
        return {
          total: file.length,
          isHtml: this.script.html ?? false,
          chunks: this.script.chunks?.() ?? ([file] as unknown as AsyncIterable<Uint8Array>),
        };
      },
      breathe: () => new Promise((resolve) => setTimeout(resolve, 0)),
      post: (message, transfer) => {
        const copy = structuredClone(message, { transfer: [...(transfer ?? [])] as ArrayBuffer[] });
        setTimeout(() => events.onMessage(copy), 0);
      },
    };
  }

  #wasm(): Wasm {
    const { script, log, received } = this;
    const memory = new WebAssembly.Memory({ initial: 1 });
    const kept = new Map<number, Omit<WasmOutput, "name" | "ptr"> & { bytes: Uint8Array }>();
    class FakeSession implements WasmSession {
      #top = 64;
      #inputs = new Map<string, Omit<WasmOutput, "name">>();
      #step = 0;
      #wanted: readonly string[] = [];
      #ended = false;
      #told = "";

      expect(bytes: number) {
        log.push(`expect ${bytes}`);
      }
      push(bytes: Uint8Array) {
        if (bytes[0] === 0x3c) throw { code: "not_onnx", message: "these bytes are not a model" };
        received.set("", Buffer.concat([received.get("") ?? Buffer.alloc(0), bytes]));
      }
      pushExternal(location: string, bytes: Uint8Array) {
        received.set(location, Buffer.concat([received.get(location) ?? Buffer.alloc(0), bytes]));
      }
      externals() {
        return script.externals;
      }
      finish() {
        if (!received.has("")) throw { code: "empty_model", message: "the file has no bytes" };
        return MODEL;
      }
      input(name: string, type: "float32", dims: Uint32Array, len: number) {
        // Growing detaches every view made before.
        memory.grow(1);
        // The first input after a run begins a new set; without one the run has those of the last.
        if (this.#ended) {
          this.#inputs.clear();
          this.#top = 64;
          this.#ended = false;
        }
        log.push(`input ${name}`);
        const ptr = this.#top;
        this.#top += len;
        this.#inputs.set(name, { type, dims: [...dims], ptr, len });
        return ptr;
      }
      inputKept(name: string, id: number) {
        const tensor = kept.get(id);
        if (tensor === undefined) throw { code: "invalid_input", message: "not in the engine" };
        const { type, dims, bytes } = tensor;
        const ptr = this.input(name, type as "float32", Uint32Array.from(dims), bytes.length);
        new Uint8Array(memory.buffer).set(bytes, ptr);
      }
      inputStrings() {
        throw { code: "unsupported_dtype", message: "no strings" };
      }
      begin(outputs: readonly string[] | undefined) {
        log.push("begin");
        this.#ended = false;
        this.#wanted = outputs ?? ["y", "m"];
        this.#step = 0;
      }
      advance() {
        const { fail } = script;
        delete script.fail;
        if (fail !== undefined) throw fail;
        this.#step++;
        return this.#step >= script.steps;
      }
      done() {
        return this.#step;
      }
      total() {
        return script.steps;
      }
      outputsChanged() {
        const now = JSON.stringify(this.outputs());
        const changed = now !== this.#told;
        this.#told = now;
        return changed;
      }
      outputs() {
        return this.#wanted.map((name) => {
          const input = this.#inputs.get(name === "y" ? "x" : "n") as Omit<WasmOutput, "name">;
          return { name, ...input };
        });
      }
      keep(name: string) {
        const { type, dims, ptr, len } = this.#inputs.get(name === "y" ? "x" : "n") as WasmOutput;
        const id = kept.size + 1;
        log.push(`keep ${name} as ${id}`);
        kept.set(id, { type, dims, len, bytes: new Uint8Array(memory.buffer, ptr, len).slice() });
        return { name, type, dims, id };
      }
      timings() {
        return [TIMING];
      }
      end() {
        log.push("end");
        this.#ended = true;
      }
      free() {
        log.push("free");
      }
    }
    class FakeQuantizer implements WasmQuantizer {
      #step = 0;
      #samples = 0;

      constructor(options: object) {
        log.push(`quantizer ${JSON.stringify(options)}`);
        if ("blockSize" in options && options.blockSize === 7) {
          throw { code: "invalid_option", message: "the block size is 7" };
        }
      }
      expect() {}
      push(bytes: Uint8Array) {
        received.set("", Buffer.concat([received.get("") ?? Buffer.alloc(0), bytes]));
      }
      pushExternal(location: string, bytes: Uint8Array) {
        received.set(location, Buffer.from(bytes));
      }
      externals() {
        return script.externals;
      }
      inputs() {
        return MODEL.inputs;
      }
      nextSample() {
        this.#samples++;
      }
      input(name: string, type: string, dims: Uint32Array, bytes: Uint8Array) {
        log.push(`sample ${name} ${type} [${dims.join(", ")}] ${bytes.byteLength}`);
      }
      begin() {
        log.push("begin");
      }
      advance() {
        const { fail } = script;
        delete script.fail;
        if (fail !== undefined) throw fail;
        this.#step++;
        return this.#step >= script.steps;
      }
      progress() {
        return { stage: "quantize", done: this.#step, total: script.steps } as const;
      }
      model() {
        return new Uint8Array(received.get("") ?? []).reverse();
      }
      report() {
        return { ...REPORT, samples: this.#samples };
      }
      free() {
        log.push("free");
      }
    }
    return {
      memory,
      startPool: (threads) => threads,
      startHelpers: async (count) => {
        log.push(`helpers ${count}`);
        if (script.pool !== true) throw { code: "unsupported_platform", message: script.pool };
      },
      WasmSession: FakeSession,
      WasmQuantizer: FakeQuantizer,
      readKept: (id) => {
        const tensor = kept.get(id);
        if (tensor === undefined) throw { code: "invalid_input", message: "not in the engine" };
        new Uint8Array(memory.buffer).set(tensor.bytes, 8);
        return { name: "", ...tensor, ptr: 8 };
      },
      releaseKept: (id) => {
        log.push(`release ${id}`);
      },
      version: () => "0.0.0",
      stopWord: () => 0,
      runningWord: () => 4,
      lastFailure: () => this.script.said,
    };
  }
}
