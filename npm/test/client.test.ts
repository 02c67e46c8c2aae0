import { expect, test } from "vitest";
import { Client } from "../src/client.js";
import type { Port, PortEvents } from "../src/environment.js";
import { WeblaneError } from "../src/errors.js";
import type { FromWorker, PoolSeat, ToWorker } from "../src/protocol.js";

/** Workers that do nothing by themselves; the first one is the engine's. */
class Workers {
  readonly all: { events: PortEvents; posted: ToWorker[]; terminated: boolean }[] = [];
  limit = Number.POSITIVE_INFINITY;

  readonly spawn = (events: PortEvents): Port => {
    if (this.all.length >= this.limit) throw new Error("no more workers");
    const worker = { events, posted: [] as ToWorker[], terminated: false };
    this.all.push(worker);
    return {
      post: (message) => worker.posted.push(message),
      keepAlive() {},
      terminate() {
        worker.terminated = true;
      },
    };
  };

  async say(worker: number, message: FromWorker): Promise<void> {
    this.all[worker]?.events.onMessage(message);
    await new Promise((resolve) => setTimeout(resolve, 0));
  }
}

const seat = { variant: "relaxed_mt", receiver: 1 } as PoolSeat;

test("pool workers start before their seats are there", async () => {
  const workers = new Workers();
  const client = new Client(workers.spawn);
  await workers.say(0, { hire: 3 });
  expect(workers.all.length).toBe(4);
  // Fewer are needed after all.
  await workers.say(0, { hire: 2 });
  expect(workers.all.map((w) => w.terminated)).toEqual([false, false, false, true]);
  await workers.say(0, { spawn: { seat, count: 2 } });
  expect(workers.all.length).toBe(4);
  expect(workers.all.slice(1, 3).map((w) => w.posted)).toEqual([[{ seat }], [{ seat }]]);
  expect(workers.all[0]?.posted).toEqual([{ spawned: true }]);
  await workers.say(1, { sits: true });
  expect(workers.all[0]?.posted.length).toBe(1);
  await workers.say(2, { sits: true });
  expect(workers.all[0]?.posted).toEqual([{ spawned: true }, { seated: true }]);
  client.close(new WeblaneError("disposed", "the end"));
  expect(workers.all.every((w) => w.terminated)).toBe(true);
});

test("seats find workers that were not hired, and say why there are none", async () => {
  const workers = new Workers();
  const client = new Client(workers.spawn);
  workers.limit = 2;
  await workers.say(0, { hire: 2 });
  expect(workers.all.length).toBe(2);
  await workers.say(0, { spawn: { seat, count: 2 } });
  const [reply] = workers.all[0]?.posted ?? [];
  expect(reply && "spawned" in reply && reply.spawned).toContain("no more workers");
  expect(client.closed).toBeUndefined();
});

test("the worker hears of the build that the page has compiled, or that there is none", async () => {
  const workers = new Workers();
  const client = new Client(workers.spawn);
  const module = new WebAssembly.Module(new Uint8Array([0, 0x61, 0x73, 0x6d, 1, 0, 0, 0]));
  client.handOver(module);
  client.handOver(undefined);
  expect(workers.all[0]?.posted).toEqual([{ compiled: module }, { compiled: undefined }]);
  client.close(new WeblaneError("disposed", "the end"));
  client.handOver(module);
  expect(workers.all[0]?.posted.length).toBe(2);
});

test("a hired worker that fails ends the client", async () => {
  const workers = new Workers();
  const client = new Client(workers.spawn);
  await workers.say(0, { hire: 1 });
  workers.all[1]?.events.onFailure("its script is gone", "network");
  expect(client.closed?.code).toBe("network");
  expect(workers.all[0]?.terminated).toBe(true);
});
