import { expect, test } from "vitest";
import {
  areLike,
  describeInputs,
  describe as describeTensor,
  MAILBOX_BYTES,
  Mailbox,
  openMailbox,
} from "../src/mailbox.js";
import type { ToWorker, WireTensor } from "../src/protocol.js";
import { Session } from "../src/session.js";
import { FakeEngine } from "./fake.js";

const bytes = (name: string, ...data: number[]): WireTensor => ({
  name,
  type: "uint8",
  dims: [data.length],
  data: Uint8Array.from(data),
});

test("both sides see the same tensors", () => {
  const inputs = [bytes("a", 1, 2, 3), bytes("b"), bytes("c", 4)];
  const page = openMailbox(describeInputs(inputs) ?? []);
  const worker = new Mailbox(page.init);
  expect(page.fits(inputs)).toBe(true);
  page.writeInputs(inputs);
  expect(worker.inputs().map(({ data }) => [...(data as Uint8Array)])).toEqual([[1, 2, 3], [], [4]]);
  const outputs = [bytes("y", 7, 8), bytes("z", 9)];
  expect(worker.writeOutputs(outputs.map(({ data }) => data as Uint8Array))).toBe(true);
  const read = page.readOutputs(outputs.map(describeTensor));
  expect(read).toEqual(outputs);
  expect(read.every(({ data }) => (data as Uint8Array).buffer instanceof ArrayBuffer)).toBe(true);
  expect(worker.writeOutputs([new Uint8Array(MAILBOX_BYTES + 1)])).toBe(false);
});

test("what a mailbox takes", () => {
  const inputs = [bytes("a", 1, 2), bytes("b", 3)];
  const places = describeInputs(inputs) ?? [];
  expect(areLike([bytes("a", 9, 9), bytes("b", 9)], places)).toBe(true);
  expect(areLike([bytes("a", 1, 2)], places)).toBe(false);
  expect(areLike([bytes("a", 1, 2), bytes("c", 3)], places)).toBe(false);
  expect(areLike([bytes("a", 1), bytes("b", 3)], places)).toBe(false);
  expect(areLike([{ ...bytes("a", 1, 2), dims: [1, 2] }, bytes("b", 3)], places)).toBe(false);
  expect(areLike([{ ...bytes("a", 1, 2), type: "int8" }, bytes("b", 3)], places)).toBe(false);
  expect(describeInputs([{ name: "s", type: "string", dims: [1], data: ["x"] }])).toBeUndefined();
  expect(describeInputs([{ ...bytes("a"), data: new Uint8Array(MAILBOX_BYTES + 1) }])).toBeUndefined();
});

test("the bell is heard only while somebody listens", () => {
  const page = openMailbox([]);
  const worker = new Mailbox(page.init);
  expect(page.ring(5)).toBe(false);
  expect(worker.listen()).toBeUndefined();
  expect(page.ring(5)).toBe(false);
  // As it is while the worker listens, and then rung.
  const words = new Int32Array(page.init.buffer, 0, 2);
  words[0] = 1;
  expect(page.ring(2 ** 31)).toBe(false);
  expect(page.ring(6)).toBe(true);
  expect(page.ring(7), "once").toBe(false);
  expect([...words]).toEqual([2, 6]);
});

/** A session whose messages to the worker are noted. */
async function watched(): Promise<[Session, FakeEngine, string[]]> {
  const engine = new FakeEngine();
  const methods: string[] = [];
  const session = await Session.loadWith(Uint8Array.of(8, 9), {}, (events) => {
    const port = engine.spawn(events);
    const post = (message: ToWorker, transfer?: readonly Transferable[]) => {
      if ("method" in message) methods.push(message.method);
      port.post(message, transfer);
    };
    return { ...port, post };
  });
  methods.length = 0;
  return [session, engine, methods];
}

test("small runs alike go through the mailbox, others by message", async () => {
  const [session, , methods] = await watched();
  const run = async (first: number, n: number[]) => {
    const { y, m } = await session.run({ x: Float32Array.of(first, 2, 3, 4, 5, 6), n });
    expect(y?.data).toEqual(Float32Array.of(first, 2, 3, 4, 5, 6));
    expect(m?.data).toEqual(BigInt64Array.from(n, BigInt));
  };
  for (const [first, n] of [
    [1, [7]],
    [2, [8]],
    [3, [9]],
    // Another shape, twice, and the first one again.
    [4, [1, 2]],
    [5, [3, 4]],
    [6, [5, 6]],
    [7, [7]],
  ] as const)
    await run(first, [...n]);
  expect(methods).toEqual(["run", "mail", "mail", "run", "mail", "mail", "run"]);

  methods.length = 0;
  await Promise.all([run(1, [1]), run(2, [2]), run(3, [3])]);
  expect(methods, "runs that overlap").toEqual(["mail", "run", "run"]);

  methods.length = 0;
  const x = Float32Array.of(1, 2, 3, 4, 5, 6);
  await session.run({ x, n: [1] }, { timeout: 1000 });
  await session.run({ x, n: [1] }, { outputs: ["m"] });
  await run(4, [4]);
  await session.profile({ x, n: [1] });
  await session.run({ x, n: [1] }, { transfer: true });
  expect(methods).toEqual(["run", "run", "mail", "run", "run"]);
});

test("a failure through the mailbox leaves the session usable", async () => {
  const [session, engine, methods] = await watched();
  const feeds = () => ({ x: Float32Array.of(1, 2, 3, 4, 5, 6), n: [1] });
  await session.run(feeds());
  await session.run(feeds());
  engine.script.fail = { code: "shape_mismatch", message: "no" };
  await expect(session.run(feeds())).rejects.toMatchObject({ code: "shape_mismatch" });
  const { y } = await session.run(feeds());
  expect(y?.data).toEqual(feeds().x);
  expect(methods).toEqual(["run", "mail", "mail", "mail"]);
});
