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
  /** Runs that were asked for and have not ended: the engine holds it for them. */
  #users = 0;

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

  /** Lets go of it, once the runs that take it have ended. */
  release(): void {
    if (this.#released) return;
    this.#released = true;
    forgotten.unregister(this);
    if (this.#users === 0) release(this.#client, this.#id);
  }

  /** A run will take it, which may wait for others: until `done` the engine keeps it, whatever becomes of the tensor. */
  use(): void {
    this.#users++;
  }

  /** That run has ended. */
  done(): void {
    this.#users--;
    if (this.#users === 0 && this.#released) release(this.#client, this.#id);
  }

  /** The run that takes it is the last; true when the engine lets go of it by itself. */
  handOver(): boolean {
    if (this.#released || this.#users > 0) {
      this.release();
      return false;
    }
    this.#released = true;
    forgotten.unregister(this);
    return true;
  }
}

function release(client: Client, id: number): void {
  // A worker that has ended holds nothing.
  client.call("release", { kept: id }).catch(() => {});
}
