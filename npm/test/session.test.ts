import { describe, expect, test, vi } from "vitest";
import type { LoadProgress, Session as SessionType } from "../src/index.js";
import { chromeTrace, Tensor, type Trace, WeblaneError } from "../src/index.js";
import { Runtime, startEngine } from "../src/runtime.js";
import { type LoadOptions, Session } from "../src/session.js";
import { PIECE_BYTES } from "../src/source.js";
import { FakeEngine, TIMING } from "./fake.js";

const x = () => Float32Array.of(1, 2, 3, 4, 5, 6);
const feeds = () => ({ x: x(), n: [7, 8] });

async function load(engine: FakeEngine, options: LoadOptions = {}): Promise<SessionType> {
  return Session.loadWith(Uint8Array.of(8, 9), options, engine.spawn);
}

/** The code a promise is rejected with; fails the test when it is not. */
async function codeOf(promise: Promise<unknown>): Promise<string> {
  const error = await promise.then(
    () => expect.fail("should have been rejected"),
    (e: unknown) => e,
  );
  expect(error).toBeInstanceOf(WeblaneError);
  return (error as WeblaneError).code;
}

test("a model is loaded, run and disposed of", async () => {
  const engine = new FakeEngine();
  const phases: LoadProgress[] = [];
  const session = await load(engine, { onProgress: (p) => phases.push({ ...p }) });
  expect(session.inputs.map((i) => i.name)).toEqual(["x", "n"]);
  expect(engine.received.get("")).toEqual(Buffer.from([8, 9]));
  expect(phases.filter((p) => p.phase === "download").at(-1)).toEqual({
    phase: "download",
    loaded: 2,
    total: 2,
  });
  for (const phase of ["compile", "parse", "optimize"]) {
    expect(phases.filter((p) => p.phase === phase).map((p) => p.loaded)).toEqual([0, 1]);
  }

  const input = x();
  const { y, m } = await session.run({ x: input, n: [7, 8] });
  expect(y).toBeInstanceOf(Tensor);
  expect(y?.data).toEqual(x());
  expect(y?.dims).toEqual([2, 3]);
  expect(m?.data).toEqual(BigInt64Array.of(7n, 8n));
  expect(input.length, "inputs are copied").toBe(6);

  const info = await session.info();
  expect(info).toMatchObject({ variant: "relaxed_st", threads: 1, opset: 17, operators: { Identity: 2 } });
  expect(info.memory).toBeGreaterThan(0);
  expect(info.threadsReason).toContain("isolated");

  await session.dispose();
  await session.dispose();
  expect(engine.terminated).toBe(1);
  expect(await codeOf(session.run(feeds()))).toBe("disposed");
  expect(await codeOf(session.info())).toBe("disposed");
});

test("transfer gives the buffers away", async () => {
  const session = await load(new FakeEngine());
  const input = x();
  const part = new Float32Array(8).subarray(1, 7);
  await session.run({ x: input, n: [1] }, { transfer: true });
  expect(input.length).toBe(0);
  await session.run({ x: part, n: [1] }, { transfer: true });
  expect(part.length, "a part of a buffer is copied").toBe(6);
});

test("only the outputs asked for come back", async () => {
  const session = await load(new FakeEngine());
  expect(Object.keys(await session.run(feeds(), { outputs: ["m"] }))).toEqual(["m"]);
  expect(await codeOf(session.run(feeds(), { outputs: ["z"] }))).toBe("unknown_input");
});

describe("outputs that stay in the engine", () => {
  test("come without elements, and can be read, given and freed", async () => {
    const engine = new FakeEngine();
    const session = await load(engine);
    const { y, m } = await session.run(feeds(), { keep: ["y"] });
    expect([y?.location, m?.location]).toEqual(["engine", "page"]);
    expect([y?.type, y?.dims, y?.size]).toEqual(["float32", [2, 3], 6]);
    expect(() => y?.data).toThrow("getData()");
    expect(await y?.getData()).toEqual(x());
    expect(await m?.getData()).toEqual(BigInt64Array.of(7n, 8n));

    const again = await session.run({ x: y as Tensor, n: [1] });
    expect(again.y?.data).toEqual(x());
    expect(engine.log).not.toContain("release 1");
    y?.dispose();
    y?.dispose();
    m?.dispose();
    expect([y?.location, m?.location]).toEqual(["none", "page"]);
    expect(await codeOf(session.run({ x: y as Tensor, n: [1] }))).toBe("disposed");
    expect(await codeOf(y?.getData() as Promise<unknown>)).toBe("disposed");
    expect(engine.log.filter((line) => line === "release 1").length).toBe(1);
  });

  test("stay for the runs that were asked for before", async () => {
    const engine = new FakeEngine();
    const session = await load(engine);
    const { y } = await session.run(feeds(), { keep: ["y"] });
    const runs = [session.run(feeds()), session.run({ x: y as Tensor, n: [1] })];
    runs.push(session.run({ x: y as Tensor, n: [1] }, { transfer: true }));
    y?.dispose();
    expect(y?.location).toBe("none");
    const results = await Promise.all(runs);
    expect(results.map((result) => result.y?.data)).toEqual([x(), x(), x()]);
    await vi.waitFor(() => expect(engine.log.filter((line) => line === "release 1").length).toBe(1));
  });

  test("are freed by a run that takes them for the last time, even if it fails", async () => {
    const engine = new FakeEngine();
    const session = await load(engine);
    for (const fail of [undefined, { code: "internal" as const, message: "no" }]) {
      engine.log.length = 0;
      const { y } = await session.run(feeds(), { keep: ["y"], outputs: [] });
      if (fail !== undefined) engine.script.fail = fail;
      await session.run({ x: y as Tensor, n: [1] }, { transfer: true }).catch(() => {});
      expect(y?.location).toBe("none");
      expect(engine.log.filter((line) => line.startsWith("release")).length).toBe(1);
    }
  });

  test("come beside the others that are asked for", async () => {
    const session = await load(new FakeEngine());
    expect(Object.keys(await session.run(feeds(), { outputs: ["m"], keep: ["y"] }))).toEqual(["m", "y"]);
    expect(Object.keys(await session.run(feeds(), { outputs: ["y"], keep: ["y"] }))).toEqual(["y"]);
    expect(await codeOf(session.run(feeds(), { keep: ["z"] }))).toBe("unknown_input");
  });

  test("belong to their engine", async () => {
    const [one, two] = [await load(new FakeEngine()), await load(new FakeEngine())];
    const { y } = await one.run(feeds(), { keep: ["y"] });
    expect(await codeOf(two.run({ x: y as Tensor, n: [1] }))).toBe("invalid_input");
    await one.dispose();
    expect(await codeOf(y?.getData() as Promise<unknown>)).toBe("disposed");
    y?.dispose();
  });
});

test("a profile has the nodes' times", async () => {
  const session = await load(new FakeEngine());
  for (const profile of [await session.profile(feeds()), await session.run(feeds(), { profile: true })]) {
    expect(profile.outputs.y?.data).toEqual(x());
    expect(profile.nodes).toEqual([TIMING]);
    expect(profile.totalMs).toBeGreaterThanOrEqual(0);
  }
  expect((await session.run(feeds(), { profile: false })).y?.data).toEqual(x());
});

test("a trace has one complete event per node, in microseconds", async () => {
  const session = await load(new FakeEngine());
  const profile = await session.run(feeds(), { profile: true });
  const { traceEvents } = JSON.parse(JSON.stringify(chromeTrace(profile))) as Trace;
  expect(traceEvents.filter(({ ph }) => ph === "M").map(({ name }) => name)).toEqual([
    "process_name",
    "thread_name",
  ]);
  expect(traceEvents.filter(({ ph }) => ph === "X")).toEqual([
    {
      name: "Identity",
      cat: "node",
      ph: "X",
      pid: 1,
      tid: 1,
      ts: 250,
      dur: 500,
      args: { node: "a", kernel: "copy", flops: 1e6, gflops: 2, readBytes: 24, writtenBytes: 24 },
    },
  ]);
});

test("inputs of the shapes of the last run are not announced again", async () => {
  const engine = new FakeEngine();
  const session = await load(engine);
  const announced = () => engine.log.splice(0).filter((line) => line.startsWith("input"));
  const run = async (n: bigint[], values = x()) => {
    const { y, m } = await session.run({ x: values, n: BigInt64Array.from(n) });
    expect([y?.data, m?.data]).toEqual([values, BigInt64Array.from(n)]);
  };
  await run([1n]);
  expect(announced()).toEqual(["input x", "input n"]);
  await run(
    [2n],
    x().map((v) => -v),
  );
  expect(announced()).toEqual([]);
  await run([3n, 4n]);
  expect(announced()).toEqual(["input x", "input n"]);
  // A run that fails leaves nothing behind that the next one could trip over.
  engine.script.fail = { code: "internal", message: "once" };
  expect(await codeOf(run([5n, 6n]))).toBe("internal");
  await run([7n, 8n]);
});

test("abort and timeout stop a run, and the session goes on", async () => {
  const engine = new FakeEngine();
  const session = await load(engine);
  engine.script.steps = Number.POSITIVE_INFINITY;

  const controller = new AbortController();
  const stopped = session.run(feeds(), {
    signal: controller.signal,
    onProgress: ({ done }) => done === 3 && controller.abort(),
  });
  const error = await stopped.catch((e: WeblaneError) => e);
  expect(error).toMatchObject({ code: "aborted" });
  expect((error as WeblaneError).cause).toMatchObject({ name: "AbortError" });
  expect(await codeOf(session.run(feeds(), { timeout: 5 }))).toBe("timeout");
  expect(await codeOf(session.run(feeds(), { signal: AbortSignal.abort() }))).toBe("aborted");
  expect(await codeOf(session.run(feeds(), { signal: AbortSignal.timeout(5) }))).toBe("timeout");
  expect(await codeOf(session.run(feeds(), { timeout: -1 }))).toBe("invalid_option");

  engine.script.steps = 2;
  expect((await session.run(feeds())).y?.data).toEqual(x());
  // Each run that had begun was ended before the next one began.
  expect(engine.log.filter((l) => l === "begin" || l === "end").join(" ")).toBe(
    "begin end begin end begin end begin end",
  );
});

test("runs of one session take turns", async () => {
  const engine = new FakeEngine();
  const session = await load(engine);
  engine.script.steps = 3;
  const results = await Promise.all([1, 2, 3].map((n) => session.run({ x: x(), n: [n] })));
  expect(results.map((r) => r.m?.data)).toEqual([1n, 2n, 3n].map((n) => BigInt64Array.of(n)));
  expect(engine.log.filter((l) => l === "begin" || l === "end").join(" ")).toBe(
    "begin end begin end begin end",
  );
});

test("an error of a run leaves the session usable", async () => {
  const engine = new FakeEngine();
  const session = await load(engine);
  engine.script.fail = { code: "shape_mismatch", message: "a is [2], wanted [3]", node: "conv1", op: "Conv" };
  const error = await session.run(feeds()).catch((e: WeblaneError) => e);
  expect(error).toMatchObject({
    code: "shape_mismatch",
    node: "conv1",
    op: "Conv",
    message: "a is [2], wanted [3]",
  });
  expect((await session.run(feeds())).y?.data).toEqual(x());
});

test("a trap breaks its worker, says why, and leaves other sessions alone", async () => {
  const engine = new FakeEngine();
  const [session, other] = [await load(engine), await load(new FakeEngine())];
  engine.script.fail = new WebAssembly.RuntimeError("unreachable");
  engine.script.said = { code: "internal", message: "index 3 of 2" };
  const error = (await session.run(feeds()).catch((e: unknown) => e)) as WeblaneError;
  expect(error.code).toBe("internal");
  expect(error.message).toContain("index 3 of 2");
  expect(await codeOf(session.run(feeds()))).toBe("internal");
  expect((await other.run(feeds())).y?.data).toEqual(x());
  await session.dispose();
});

test("memory that ran out is called so", async () => {
  const engine = new FakeEngine();
  const session = await load(engine);
  engine.script.fail = new WebAssembly.RuntimeError("unreachable");
  engine.script.said = { code: "out_of_memory", message: "400 bytes could not be allocated" };
  expect(await codeOf(session.run(feeds()))).toBe("out_of_memory");
});

test("a crash of the worker rejects everything that is pending", async () => {
  const engine = new FakeEngine();
  const session = await load(engine);
  engine.script.steps = Number.POSITIVE_INFINITY;
  const pending = [session.run(feeds()), session.run(feeds()), session.info()];
  const settled = Promise.allSettled(pending);
  engine.crash("boom");
  for (const result of await settled) {
    expect(result).toMatchObject({ status: "rejected", reason: { code: "internal" } });
  }
  expect(await codeOf(session.run(feeds()))).toBe("internal");
});

test("disposing rejects what is pending", async () => {
  const engine = new FakeEngine();
  const session = await load(engine);
  engine.script.steps = Number.POSITIVE_INFINITY;
  const pending = codeOf(session.run(feeds()));
  await session.dispose();
  expect(await pending).toBe("disposed");
});

test("a load that fails ends its worker", async () => {
  const cases: [Partial<FakeEngine["script"]>, Uint8Array | string, string][] = [
    [{}, new Uint8Array(0), "empty_model"],
    [{}, new TextEncoder().encode("<html>"), "not_onnx"],
    [{}, "http://localhost/none.onnx", "network"],
    [{ startError: { code: "network", message: "no wasm" } }, Uint8Array.of(1), "network"],
    [{ startError: new Error("odd") }, Uint8Array.of(1), "internal"],
    [{ externals: ["weights.bin"] }, Uint8Array.of(1), "external_data"],
  ];
  for (const [script, source, code] of cases) {
    const engine = new FakeEngine();
    Object.assign(engine.script, script);
    expect(await codeOf(Session.loadWith(source, {}, engine.spawn))).toBe(code);
    expect(engine.terminated).toBe(1);
  }
});

test("an HTML page in the place of a model is named", async () => {
  const engine = new FakeEngine();
  engine.script.files["http://localhost/m.onnx"] = new TextEncoder().encode("<!doctype html>");
  engine.script.html = true;
  await expect(Session.loadWith("http://localhost/m.onnx", {}, engine.spawn)).rejects.toThrow(
    "http://localhost/m.onnx is an HTML page, not a model",
  );
});

test("a load can be aborted", async () => {
  const engine = new FakeEngine();
  const controller = new AbortController();
  // A stream that never gives anything.
  const stream = new ReadableStream<Uint8Array>({ pull: () => new Promise(() => {}) });
  const loading = codeOf(Session.loadWith(stream, { signal: controller.signal }, engine.spawn));
  setTimeout(() => controller.abort(), 5);
  expect(await loading).toBe("aborted");
  expect(engine.terminated).toBe(1);
  expect(await codeOf(load(new FakeEngine(), { signal: AbortSignal.abort() }))).toBe("aborted");
});

test("every kind of source arrives whole", async () => {
  const bytes = Uint8Array.from({ length: PIECE_BYTES + 10 }, (_, i) => (i * 7) % 59);
  const shared = new SharedArrayBuffer(bytes.length);
  new Uint8Array(shared).set(bytes);
  const sources = [
    bytes,
    bytes.buffer,
    shared,
    new DataView(bytes.buffer),
    new Blob([bytes]),
    new Response(bytes),
    new Response(bytes).body as ReadableStream<Uint8Array>,
  ];
  for (const source of sources) {
    const engine = new FakeEngine();
    await Session.loadWith(source, {}, engine.spawn);
    expect(engine.received.get("")?.equals(bytes)).toBe(true);
  }
  expect(bytes.length, "the caller keeps the bytes").toBe(PIECE_BYTES + 10);
  expect(
    await codeOf(Session.loadWith(new Response(null, { status: 404 }), {}, new FakeEngine().spawn)),
  ).toBe("network");
  expect(await codeOf(Session.loadWith(5 as never, {}, new FakeEngine().spawn))).toBe("invalid_input");
});

test("external data comes from the caller or from beside the model", async () => {
  const weights = Uint8Array.of(1, 2, 3);
  for (const externalData of [
    { "w.bin": weights },
    (name: string) => (name === "./w.bin" ? weights : "nowhere"),
  ]) {
    const engine = new FakeEngine();
    engine.script.externals = ["./w.bin"];
    await load(engine, { externalData });
    expect(engine.received.get("./w.bin")).toEqual(Buffer.from([1, 2, 3]));
  }

  const engine = new FakeEngine();
  engine.script.externals = ["sub dir/w.bin"];
  engine.script.files = { "http://a/m/x.onnx": weights, "http://a/m/sub%20dir/w.bin": weights };
  await Session.loadWith("http://a/m/x.onnx", {}, engine.spawn);
  expect(engine.received.get("sub dir/w.bin")).toEqual(Buffer.from([1, 2, 3]));

  for (const outside of ["../w.bin", "/w.bin", "http://b/w.bin", "a/../../w.bin", "\\w.bin"]) {
    const engine = new FakeEngine();
    engine.script.externals = [outside];
    engine.script.files = { "http://a/m/x.onnx": weights };
    expect(await codeOf(Session.loadWith("http://a/m/x.onnx", {}, engine.spawn))).toBe("external_data");
  }
});

test("options are checked", async () => {
  const bad: LoadOptions[] = [
    { optimize: "some" as never },
    { precision: "half" as never },
    { threads: -1 },
    { threads: 1.5 },
    { variant: "fast" as never },
    { wasmPaths: { fast: "x" } as never },
  ];
  for (const options of bad) expect(await codeOf(load(new FakeEngine(), options))).toBe("invalid_option");
  expect(await codeOf(load(new FakeEngine(), { variant: "relaxed_mt" }))).toBe("unsupported_platform");
});

test("the build comes from where wasmPaths says", async () => {
  for (const wasmPaths of [
    "http://cdn/w",
    "http://cdn/w/",
    { relaxed_st: "http://cdn/w/weblane_relaxed_st.wasm" },
  ]) {
    const engine = new FakeEngine();
    await load(engine, { wasmPaths });
    expect(engine.log[0]).toBe("instantiate relaxed_st http://cdn/w/weblane_relaxed_st.wasm");
  }
});

test("sessions share a runtime", async () => {
  const engine = new FakeEngine();
  const started = startEngine({}, undefined, engine.spawn);
  const runtime = Object.assign(Object.create(Runtime.prototype) as Runtime, {
    engine: started,
    info: await started.ready,
  });
  const [a, b] = [await load(engine, { runtime }), await load(engine, { runtime })];
  expect(engine.log.filter((l) => l.startsWith("instantiate")).length).toBe(1);
  expect(await codeOf(load(engine, { runtime, threads: 2 }))).toBe("invalid_option");

  engine.script.steps = 50;
  const pending = codeOf(a.run(feeds()));
  await a.dispose();
  expect(await pending).toBe("disposed");
  expect(engine.terminated).toBe(0);
  engine.script.steps = 1;
  expect((await b.run(feeds())).y?.data).toEqual(x());
  await runtime.dispose();
  await b.dispose();
  expect(engine.terminated).toBe(1);
  expect(await codeOf(b.run(feeds()))).toBe("disposed");
});

test("a process need not stay alive for an idle session", async () => {
  const engine = new FakeEngine();
  const session = await load(engine);
  expect(engine.keptAlive).toBe(false);
  const pending = session.run(feeds());
  await Promise.resolve();
  expect(engine.keptAlive).toBe(true);
  await pending;
  expect(engine.keptAlive).toBe(false);
});

test("without memory to share, one thread does it", async () => {
  const engine = new FakeEngine();
  engine.platform = { ...engine.platform, sharedMemory: true };
  const session = await load(engine);
  expect(engine.log.filter((l) => l.startsWith("instantiate"))).toEqual([
    "instantiate relaxed_mt",
    "instantiate relaxed_st",
  ]);
  const { variant, threads, threadsReason } = await session.info();
  expect([variant, threads]).toEqual(["relaxed_st", 1]);
  expect(threadsReason).toContain("no shared memory");

  const forced = new FakeEngine();
  forced.platform = engine.platform;
  expect(await codeOf(load(forced, { variant: "relaxed_mt" }))).toBe("out_of_memory");
});

describe("helpers", () => {
  /** A fake on a machine of so many processors, and what became of its helpers. */
  function machine(processors: number, steps = 1) {
    const engine = new FakeEngine();
    engine.platform = { ...engine.platform, sharedMemory: true, processors };
    Object.assign(engine.script, { pool: true, steps });
    return { engine, helpers: () => engine.log.filter((line) => /^(hire|helpers)/.test(line)) };
  }

  test("start with the build where there are processors for them", async () => {
    const { engine, helpers } = machine(4);
    await load(engine);
    expect(helpers()).toEqual(["hire 3", "helpers 3"]);
  });

  test("start at once when a number of threads is asked for", async () => {
    const { engine, helpers } = machine(2);
    await load(engine, { threads: 2 });
    expect(helpers()).toEqual(["hire 1", "helpers 1"]);
  });

  test("start after the first run on two processors, and once", async () => {
    const { engine, helpers } = machine(2);
    const session = await load(engine);
    expect((await session.info()).threads).toBe(2);
    expect(helpers()).toEqual([]);
    await session.run(feeds());
    await session.run(feeds());
    expect(helpers()).toEqual(["helpers 1"]);
  });

  test("start with the bytes of a large model", async () => {
    const { engine } = machine(2);
    await Session.loadWith(new Uint8Array(20 << 20), {}, engine.spawn);
    expect(engine.log).toContain("helpers 1");
    expect(engine.log.indexOf("helpers 1")).toBeLessThan(engine.log.indexOf(`expect ${20 << 20}`));
  });

  test("start in the middle of a long first run", async () => {
    const { engine, helpers } = machine(2, 3);
    const session = await load(engine);
    const during: string[][] = [];
    await session.run(feeds(), { onProgress: () => during.push(helpers()) });
    expect(during[0]).toEqual(["helpers 1"]);
  });

  test("start when nothing is run for a while", async () => {
    const { engine, helpers } = machine(2);
    await load(engine);
    await vi.waitFor(() => expect(helpers()).toEqual(["helpers 1"]));
  });

  test("that cannot start after all leave one thread, with a warning", async () => {
    const warn = vi.spyOn(console, "warn").mockReturnValue();
    const { engine } = machine(2);
    engine.script.pool = "no more workers";
    const session = await load(engine);
    await session.run(feeds());
    expect((await session.run(feeds())).y?.data).toEqual(x());
    expect(warn.mock.calls).toEqual([[expect.stringContaining("no more workers")]]);
    warn.mockRestore();
  });
});

test("without workers for a pool, one thread of the same build does it", async () => {
  const engine = new FakeEngine();
  engine.platform = { ...engine.platform, sharedMemory: true };
  engine.script.pool = "no more workers";
  const session = await load(engine);
  const { variant, threads, threadsReason } = await session.info();
  expect([variant, threads]).toEqual(["relaxed_mt", 1]);
  expect(threadsReason).toContain("no more workers");
  expect((await session.run(feeds())).y?.data).toEqual(x());

  const forced = new FakeEngine();
  forced.platform = engine.platform;
  forced.script.pool = "no more workers";
  expect(await codeOf(load(forced, { variant: "relaxed_mt" }))).toBe("unsupported_platform");
});

test("a file is read while the build compiles, through one buffer", async () => {
  const engine = new FakeEngine();
  engine.script.files = { "http://a/m.onnx": new Uint8Array(8) };
  let start: (value?: unknown) => void = () => {};
  engine.script.starting = new Promise((resolve) => {
    start = resolve;
  });
  engine.script.chunks = async function* () {
    const buffer = new Uint8Array(2);
    for (const byte of [1, 2, 3, 4]) {
      // Nobody but the reader lets the build start.
      if (byte === 3) {
        start();
        await new Promise((resolve) => setTimeout(resolve, 5));
      }
      yield buffer.fill(byte);
    }
  };
  await Session.loadWith("http://a/m.onnx", {}, engine.spawn);
  expect([...(engine.received.get("") ?? [])]).toEqual([1, 1, 2, 2, 3, 3, 4, 4]);
  expect(engine.log.filter((l) => l.startsWith("expect"))).toEqual(["expect 8"]);
});

test("a small network runs while a file arrives slowly, and only then", async () => {
  for (const [ms, first, log] of [
    [5, 1, ["begin", "end", "begin", "end", "free"]],
    [0, 993, []],
  ] as const) {
    const engine = new FakeEngine();
    engine.script.files = { "http://a/m.onnx": new Uint8Array(1000) };
    engine.script.chunks = async function* () {
      // At a byte in 5 ms the rest would take seconds; when nearly all came at once it takes nothing.
      for (let i = 0; i < 8; i++) {
        if (ms > 0) await new Promise((resolve) => setTimeout(resolve, ms));
        yield new Uint8Array(i === 0 ? first : 1);
      }
    };
    await Session.loadWith("http://a/m.onnx", {}, engine.spawn);
    expect(engine.log.filter((l) => ["begin", "end", "free"].includes(l))).toEqual(log);
  }
});

test("the engine hears how long a model will be", async () => {
  const engine = new FakeEngine();
  await load(engine);
  expect(engine.log.filter((l) => l.startsWith("expect"))).toEqual(["expect 2"]);
  const unknown = new FakeEngine();
  const stream = new Response(Uint8Array.of(8, 9)).body as ReadableStream<Uint8Array>;
  await Session.loadWith(stream, {}, unknown.spawn);
  expect(unknown.log.filter((l) => l.startsWith("expect"))).toEqual([]);
});
