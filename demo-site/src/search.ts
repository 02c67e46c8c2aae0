/** Page one: sentences by meaning. */
import "./style.css";
import { Tokenizer } from "@huggingface/tokenizers";
import { Session } from "weblane";
import { SENTENCES } from "./sentences.ts";
import { byId, element, milliseconds, onProgress, showError, showProgress, showReady } from "./status.ts";

const FOLDER = "./models/all_minilm_l6_v2/";
const SHOWN = 8;
/** Sentences that go through the model together. Equal lengths in a batch waste nothing on padding. */
const BATCH = 16;

const query = byId<HTMLInputElement>("query");
const results = byId<HTMLOListElement>("results");

async function json(path: string): Promise<object> {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: the server answered ${response.status}`);
  return response.json();
}

/** Turns sentences into unit vectors, one after the other in one array. */
class Embedder {
  readonly #session: Session;
  readonly #tokenizer: Tokenizer;

  constructor(session: Session, tokenizer: Tokenizer) {
    this.#session = session;
    this.#tokenizer = tokenizer;
  }

  tokens(text: string): number[] {
    // The model was trained on 256 tokens at most; the last one is the separator.
    const { ids } = this.#tokenizer.encode(text);
    return ids.length <= 256 ? ids : [...ids.slice(0, 255), ...ids.slice(-1)];
  }

  async embed(rows: readonly number[][]): Promise<Float32Array[]> {
    const length = Math.max(...rows.map((row) => row.length));
    const dims = [rows.length, length];
    const ids = new BigInt64Array(rows.length * length);
    const mask = new BigInt64Array(ids.length);
    for (const [r, row] of rows.entries()) {
      for (const [i, id] of row.entries()) {
        ids[r * length + i] = BigInt(id);
        mask[r * length + i] = 1n;
      }
    }
    const { sentence_embedding } = await this.#session.run(
      {
        input_ids: { data: ids, dims },
        attention_mask: { data: mask, dims },
        token_type_ids: { data: new BigInt64Array(ids.length), dims },
      },
      { outputs: ["sentence_embedding"] },
    );
    if (!(sentence_embedding?.data instanceof Float32Array)) throw new Error("the model gave no embedding");
    const data = sentence_embedding.data;
    const width = data.length / rows.length;
    return rows.map((_, r) => data.slice(r * width, (r + 1) * width));
  }
}

/** Embeddings have length 1, so this is the cosine. */
function dot(a: Float32Array, b: Float32Array): number {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += (a[i] ?? 0) * (b[i] ?? 0);
  return sum;
}

async function index(embedder: Embedder): Promise<Float32Array[]> {
  const rows = SENTENCES.map((text, i) => ({ i, tokens: embedder.tokens(text) }));
  rows.sort((a, b) => a.tokens.length - b.tokens.length);
  const vectors: Float32Array[] = new Array(rows.length);
  for (let at = 0; at < rows.length; at += BATCH) {
    showProgress(`Reading ${SENTENCES.length} sentences …`, at, rows.length);
    const batch = rows.slice(at, at + BATCH);
    const found = await embedder.embed(batch.map((row) => row.tokens));
    for (const [k, row] of batch.entries()) vectors[row.i] = found[k] as Float32Array;
  }
  return vectors;
}

function render(scores: { text: string; score: number }[]): void {
  results.replaceChildren(
    ...scores.map(({ text, score }) => {
      const bar = element("i");
      bar.style.width = `${Math.max(0, score) * 100}%`;
      const item = element(
        "li",
        {},
        element("span", { textContent: text }),
        element("span", { className: "score", textContent: score.toFixed(3) }),
        element("span", { className: "meter" }, bar),
      );
      Object.assign(item.dataset, { testid: "result", score: String(score) });
      return item;
    }),
  );
}

async function main(): Promise<void> {
  const [session, tokenizer, config] = await Promise.all([
    Session.load(`${FOLDER}model_int8.onnx`, { onProgress }),
    json(`${FOLDER}tokenizer.json`),
    json(`${FOLDER}tokenizer_config.json`),
  ]);
  const embedder = new Embedder(session, new Tokenizer(tokenizer, config));
  const start = performance.now();
  const vectors = await index(embedder);
  const indexed = performance.now() - start;
  await showReady(session, `${SENTENCES.length} sentences read in ${milliseconds(indexed)}`);
  query.disabled = false;
  query.focus();

  let [busy, again] = [false, false];
  /** One run at a time: what is typed meanwhile is asked together by the next. */
  async function ask(): Promise<void> {
    again = true;
    if (busy) return;
    busy = true;
    try {
      while (again) {
        again = false;
        const text = query.value.trim();
        if (!text) {
          results.replaceChildren();
          continue;
        }
        const start = performance.now();
        const [vector] = await embedder.embed([embedder.tokens(text)]);
        const took = performance.now() - start;
        if (!vector) continue;
        const scores = SENTENCES.map((text, i) => ({ text, score: dot(vector, vectors[i] as Float32Array) }));
        scores.sort((a, b) => b.score - a.score);
        render(scores.slice(0, SHOWN));
        results.dataset["query"] = text;
        await showReady(session, `your sentence took ${milliseconds(took)}`);
      }
    } catch (error) {
      showError("The sentence could not be compared.", error);
    }
    busy = false;
  }
  query.addEventListener("input", ask);
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    void ask();
  });
  for (const button of document.querySelectorAll<HTMLButtonElement>("[data-example]")) {
    button.addEventListener("click", () => {
      query.value = button.textContent ?? "";
      void ask();
    });
  }
}

main().catch((error) => showError("The search could not start.", error));
