/**
 * Uses the built demo site as a visitor would: node demo-check.mjs DIRECTORY
 *
 * Page one marks its parts for this script: `data-testid="query"` on the text field, `data-testid="result"` with a
 * `data-score` on every answer, `data-testid="error"` on the place where an error is shown, `data-testid="status"` on the line
 * that says variant and threads.
 */
import { mkdirSync } from "node:fs";
import { resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { launchPuppeteer } from "./lib/drivers.mjs";
import { serve } from "./lib/server.mjs";

const QUESTION = "How do I keep my bread from going stale?";
const LIMIT_MS = 180_000;
const SCREENSHOT = resolve(fileURLToPath(new URL("../../target", import.meta.url)), "demo-check.png");

const [directory] = process.argv.slice(2);
if (!directory) throw new Error("usage: node demo-check.mjs DIRECTORY");
const server = await serve({ "/": directory });
const browser = await launchPuppeteer("chromium");
let failed = true;
try {
  const page = await browser.newPage();
  await page.setViewport({ width: 1100, height: 900 });
  const problems = [];
  const lost = [];
  page.on("pageerror", (error) => problems.push(error.message));
  // An answer proves that what it took has arrived, so failed requests are named only where there is none.
  page.on("requestfailed", (request) =>
    lost.push(`failed to load ${request.url()}: ${request.failure()?.errorText}`),
  );
  page.on("response", (response) => {
    if (response.status() >= 400) problems.push(`HTTP ${response.status()} for ${response.url()}`);
  });
  try {
    await page.goto(`${server.url}/`);
    const start = Date.now();
    const field = await page.waitForSelector('[data-testid="query"]:not([disabled])', { timeout: LIMIT_MS });
    await field.type(QUESTION);
    await field.press("Enter");
    await page.waitForFunction(
      // Answers come with every letter; those to the whole sentence count.
      (question) =>
        document.querySelector('[data-testid="result"]')?.parentElement.dataset.query === question ||
        document.querySelector('[data-testid="error"]')?.textContent.trim(),
      { timeout: LIMIT_MS },
      QUESTION,
    );
    const seen = await page.evaluate(() => {
      const text = (element) =>
        [...(element?.children.length ? element.children : [element])]
          .map((part) => part?.textContent.replace(/\s+/g, " ").trim())
          .filter(Boolean)
          .join(" | ");
      return {
        error: text(document.querySelector('[data-testid="error"]')),
        status: text(document.querySelector('[data-testid="status"]')),
        results: [...document.querySelectorAll('[data-testid="result"]')].map((element) => ({
          text: text(element),
          score: Number(element.dataset.score),
        })),
      };
    });
    if (seen.error) throw new Error(`the page shows an error: ${seen.error}`);
    const { results } = seen;
    if (results.length < 3) throw new Error(`${results.length} answers, wanted at least 3`);
    const inOrder = results.every(
      ({ score }, i) => score <= 1.0001 && (i === 0 || score <= results[i - 1].score),
    );
    // Far below what MiniLM gives for a sentence on the same matter, far above what it gives for unrelated ones.
    if (!inOrder || !(results[0].score > 0.3)) {
      throw new Error(
        `scores are not those of a working model: ${results.map(({ score }) => score).join(", ")}`,
      );
    }
    if (problems.length) throw new Error(`the page had problems: ${problems.join("; ")}`);
    console.log(`   asked "${QUESTION}"`);
    for (const { text } of results.slice(0, 3)) console.log(`   ${text}`);
    console.log(`   ${seen.status}; ${((Date.now() - start) / 1000).toFixed(1)} s from opening to answer`);
    failed = false;
  } finally {
    mkdirSync(resolve(SCREENSHOT, ".."), { recursive: true });
    await page.screenshot({ path: SCREENSHOT });
    if (failed) for (const line of [...problems, ...lost]) console.error(`   ${line}`);
  }
} finally {
  await browser.close();
  await server.close();
}
