/**
 * Tensors that stay in the engine between runs: the page has their number.
 */
import type { Client } from "./client.js";
import { WeblaneError } from "./errors.js";
import type { WireTensor } from "./protocol.js";

/** Tells the engine to let go of what nobody on the page can reach any more. */
const forgotten = new FinalizationRegistry<{ client: Client; id: number }>(({ client, id }) => {
  release(client, id);
});

/** A tensor's place in the engine. */
export class Kept {
  readonly #client: Client;
  readonly #id: number;
  #released = false;

  constructor(client: Client, id: number) {
    this.#client = client;
    this.#id = id;
    forgotten.register(this, { client, id }, this);
  }

  /** Whether the page has let go of it. */
  get released(): boolean {
    return this.#released;
  }

  /** Its number, for a call to this worker; nothing when it belongs to another one. */
  idFor(client: Client): number | undefined {
    return client === this.#client ? this.#id : undefined;
  }

  /** The elements, copied to the page. */
  async read(): Promise<WireTensor> {
    if (this.#released) throw new WeblaneError("disposed", "the tensor was disposed of");
    return this.#client.call("read", { kept: this.#id });
  }

  /** Lets go of it. */
  release(): void {
    if (this.handOver()) release(this.#client, this.#id);
  }

  /** The engine lets go of it by itself; false when it was let go before. */
  handOver(): boolean {
    if (this.#released) return false;
    this.#released = true;
    forgotten.unregister(this);
    return true;
  }
}

function release(client: Client, id: number): void {
  // A worker that has ended holds nothing.
  client.call("release", { kept: id }).catch(() => {});
}
