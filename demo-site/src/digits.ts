/** Page two: a drawn digit. */
import "./style.css";
import { Session } from "weblane";
import { byId, element, milliseconds, onProgress, showError, showReady } from "./status.ts";

/** Width and height of what the model sees. */
const SIZE = 28;
/** The drawing is scaled so that its longer side has this length, as in the data that the model was trained on. */
const INK = 20;

const canvas = byId<HTMLCanvasElement>("canvas");
const answer = byId("answer");
const bars = byId<HTMLOListElement>("bars");

function context(of: HTMLCanvasElement): CanvasRenderingContext2D {
  const made = of.getContext("2d", { willReadFrequently: true });
  if (!made) throw new Error("this browser gives no 2-D canvas");
  return made;
}
const pen = context(canvas);

/** Bounds of what is drawn, or nothing. */
function bounds(): { x: number; y: number; width: number; height: number } | undefined {
  const { data, width, height } = pen.getImageData(0, 0, canvas.width, canvas.height);
  let [left, top, right, bottom] = [width, height, -1, -1];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if ((data[(y * width + x) * 4] ?? 0) < 32) continue;
      left = Math.min(left, x);
      right = Math.max(right, x);
      top = Math.min(top, y);
      bottom = Math.max(bottom, y);
    }
  }
  if (right < 0) return undefined;
  return { x: left, y: top, width: right - left + 1, height: bottom - top + 1 };
}

/** The drawing centred in 28 x 28, white on black, 0..1. */
function picture(): Float32Array | undefined {
  const box = bounds();
  if (!box) return undefined;
  const small = Object.assign(document.createElement("canvas"), { width: SIZE, height: SIZE });
  const to = context(small);
  const scale = INK / Math.max(box.width, box.height);
  const [w, h] = [box.width * scale, box.height * scale];
  to.imageSmoothingQuality = "high";
  to.fillRect(0, 0, SIZE, SIZE);
  to.drawImage(canvas, box.x, box.y, box.width, box.height, (SIZE - w) / 2, (SIZE - h) / 2, w, h);
  const { data } = to.getImageData(0, 0, SIZE, SIZE);
  return Float32Array.from({ length: SIZE * SIZE }, (_, i) => (data[i * 4] ?? 0) / 255);
}

function render(probabilities?: ArrayLike<number>): void {
  const of = (digit: number) => probabilities?.[digit] ?? 0;
  const digits = [...Array(10).keys()];
  answer.textContent = probabilities ? String(digits.reduce((a, b) => (of(b) > of(a) ? b : a))) : "?";
  bars.replaceChildren(
    ...digits.map((digit) => {
      const bar = element("i");
      bar.style.width = `${of(digit) * 100}%`;
      const percent = probabilities ? `${(of(digit) * 100).toFixed(1)}%` : "";
      return element(
        "li",
        {},
        element("span", { textContent: String(digit) }),
        element("span", { className: "meter" }, bar),
        element("span", { className: "score", textContent: percent }),
      );
    }),
  );
}

function clear(): void {
  pen.fillStyle = "#000";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  render();
}

async function main(): Promise<void> {
  clear();
  const session = await Session.load("./models/digits/model.onnx", { onProgress });
  await showReady(session);

  let [busy, again] = [false, false];
  /** One run at a time; strokes that come meanwhile are read together by the next. */
  async function read(): Promise<void> {
    if (busy) {
      again = true;
      return;
    }
    busy = true;
    try {
      do {
        again = false;
        const data = picture();
        if (!data) continue;
        const start = performance.now();
        const { probabilities } = await session.run({ input: { data, dims: [1, 1, SIZE, SIZE] } });
        const took = performance.now() - start;
        if (!(probabilities?.data instanceof Float32Array))
          throw new Error("the model gave no probabilities");
        render(bounds() ? probabilities.data : undefined);
        await showReady(session, `reading took ${milliseconds(took)}`);
      } while (again);
    } catch (error) {
      showError("The drawing could not be read.", error);
    }
    busy = false;
  }

  let last: [number, number] | undefined;
  const position = (event: PointerEvent): [number, number] => {
    const { left, top, width } = canvas.getBoundingClientRect();
    const scale = canvas.width / width;
    return [(event.clientX - left) * scale, (event.clientY - top) * scale];
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    last = position(event);
    stroke(last);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (last) stroke(position(event));
  });
  for (const end of ["pointerup", "pointercancel"] as const) {
    canvas.addEventListener(end, () => {
      last = undefined;
    });
  }
  function stroke(to: [number, number]): void {
    pen.strokeStyle = "#fff";
    pen.lineWidth = 22;
    pen.lineCap = "round";
    pen.beginPath();
    pen.moveTo(...(last ?? to));
    pen.lineTo(...to);
    pen.stroke();
    last = to;
    void read();
  }
  byId("clear").addEventListener("click", clear);
}

main().catch((error) => showError("The digit reader could not start.", error));
