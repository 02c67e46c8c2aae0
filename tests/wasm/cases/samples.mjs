/**
 * Published models on real pictures and speech, prepared in the page as an application would, against what native
 * onnxruntime sees in them. The samples are not part of the project; without them the cases are skipped.
 */

const MODELS = "/target/models-test";

async function sample(ctx, name) {
  const response = await fetch(ctx.url(`/samples/${name}`)).catch(() => undefined);
  if (!response?.ok) ctx.skip(`the sample ${name} is not there`);
  return response.blob();
}

async function load(ctx, name) {
  const names = await ctx.fetchJson(`${MODELS}/index.json`);
  if (!names.includes(name)) ctx.skip(`the model ${name} is not there`);
  return ctx.weblane.Session.load(ctx.url(`${MODELS}/${name}/model.onnx`));
}

/**
 * Weights of the source pixels in each of `target` pixels: a triangle as wide as the scale, the "bilinear" filter of Pillow,
 * with which the expected scores were made.
 */
function triangle(target, source) {
  const scale = Math.max(1, source / target);
  return Array.from({ length: target }, (_, i) => {
    const centre = ((i + 0.5) * source) / target;
    const first = Math.max(0, Math.floor(centre - scale + 0.5));
    const last = Math.min(source, Math.floor(centre + scale + 0.5));
    const weights = [];
    for (let k = first; k < last; k++) weights.push(Math.max(0, 1 - Math.abs(k + 0.5 - centre) / scale));
    const sum = weights.reduce((x, y) => x + y, 0);
    return { first, weights: weights.map((w) => w / sum) };
  });
}

/**
 * RGBA of a part of a picture, scaled to `width` x `height` in the corner of a grey square. The scaling is done here,
 * because browsers scale each in its own way, which moves scores by several hundredths.
 */
async function pixels(ctx, blob, size, grey, place) {
  if (typeof document === "undefined") ctx.skip("no canvas here");
  const bitmap = await createImageBitmap(blob);
  const canvas = Object.assign(document.createElement("canvas"), {
    width: bitmap.width,
    height: bitmap.height,
  });
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const { x, y, w, h, width, height } = place(bitmap);
  const from = context.getImageData(x, y, w, h).data;
  const rows = new Float32Array(h * width * 4);
  for (const [column, { first, weights }] of triangle(width, w).entries()) {
    for (let row = 0; row < h; row++) {
      for (let c = 0; c < 4; c++) {
        let sum = 0;
        for (const [k, weight] of weights.entries()) sum += weight * from[(row * w + first + k) * 4 + c];
        rows[(row * width + column) * 4 + c] = sum;
      }
    }
  }
  const to = new Uint8ClampedArray(size * size * 4).fill(grey);
  for (const [row, { first, weights }] of triangle(height, h).entries()) {
    for (let i = 0; i < width * 4; i++) {
      let sum = 0;
      for (const [k, weight] of weights.entries()) sum += weight * rows[(first + k) * width * 4 + i];
      to[row * size * 4 + i] = sum;
    }
  }
  return to;
}

/** RGBA to planes of blue, green and red, 0..255. */
function bgrPlanes(rgba, size) {
  const plane = size * size;
  const out = new Float32Array(3 * plane);
  for (let i = 0; i < plane; i++) {
    for (let c = 0; c < 3; c++) out[c * plane + i] = rgba[i * 4 + 2 - c];
  }
  return out;
}

const COCO = {
  0: "person",
  15: "cat",
  30: "skis",
  32: "sports ball",
  35: "baseball glove",
  77: "teddy bear",
};

/** YOLOX's boxes: offsets of a grid cell, sizes as logarithms, for each of three strides; then suppression at 0.45. */
function detections(data, size) {
  const found = [];
  let row = 0;
  for (const stride of [8, 16, 32]) {
    const cells = size / stride;
    for (let y = 0; y < cells; y++) {
      for (let x = 0; x < cells; x++, row++) {
        const at = data.subarray(row * 85, row * 85 + 85);
        let best = 5;
        for (let c = 6; c < 85; c++) if (at[c] > at[best]) best = c;
        const score = at[4] * at[best];
        if (score < 0.3) continue;
        const [cx, cy] = [(at[0] + x) * stride, (at[1] + y) * stride];
        const [w, h] = [Math.exp(at[2]) * stride, Math.exp(at[3]) * stride];
        found.push({ label: best - 5, score, box: [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2] });
      }
    }
  }
  found.sort((a, b) => b.score - a.score);
  const overlap = (a, b) => {
    const [w, h] = [0, 1].map((i) => Math.max(0, Math.min(a[i + 2], b[i + 2]) - Math.max(a[i], b[i])));
    const area = (box) => (box[2] - box[0]) * (box[3] - box[1]);
    return (w * h) / (area(a) + area(b) - w * h);
  };
  const kept = [];
  for (const one of found) {
    if (kept.every((other) => other.label !== one.label || overlap(one.box, other.box) < 0.45))
      kept.push(one);
  }
  return kept;
}

/** The scores are given to two places, and decoders of JPEG differ in the last bit of a pixel. */
const SCORE_TOLERANCE = 0.02;

function yolox(picture, wanted) {
  return {
    name: `yolox_nano on ${picture}`,
    async run(ctx) {
      const size = 416;
      const blob = await sample(ctx, picture);
      const rgba = await pixels(ctx, blob, size, 114, ({ width: w, height: h }) => {
        const scale = Math.min(size / w, size / h);
        return { x: 0, y: 0, w, h, width: Math.floor(w * scale), height: Math.floor(h * scale) };
      });
      const session = await load(ctx, "yolox_nano");
      try {
        const data = bgrPlanes(rgba, size);
        const feeds = { [session.inputs[0].name]: { data, dims: [1, 3, size, size] } };
        const outputs = await session.run(feeds);
        const seen = detections(outputs[session.outputs[0].name].data, size);
        const text = seen.map(({ label, score }) => `${COCO[label] ?? label} ${score.toFixed(2)}`).join(", ");
        for (const [label, score] of wanted) {
          const at = seen.findIndex(
            (one) => COCO[one.label] === label && Math.abs(one.score - score) <= SCORE_TOLERANCE,
          );
          ctx.assert(at >= 0, `saw ${text}; wanted ${label} ${score}`);
          seen.splice(at, 1);
        }
        return text;
      } finally {
        await session.dispose();
      }
    },
  };
}

function squeezenet(picture, label, probability) {
  return {
    name: `squeezenet_fp16 on ${picture}`,
    async run(ctx) {
      const size = 224;
      const blob = await sample(ctx, picture);
      const rgba = await pixels(ctx, blob, size, 0, ({ width, height }) => {
        const side = Math.min(width, height);
        const [x, y] = [Math.floor((width - side) / 2), Math.floor((height - side) / 2)];
        return { x, y, w: side, h: side, width: size, height: size };
      });
      const session = await load(ctx, "squeezenet_fp16");
      try {
        const data = ctx.weblane.encodeFloat16(bgrPlanes(rgba, size));
        const input = session.inputs[0].name;
        const outputs = await session.run({ [input]: { type: "float16", data, dims: [1, 3, size, size] } });
        const output = outputs[session.outputs[0].name].data;
        const scores =
          output instanceof Uint16Array ? ctx.weblane.decodeFloat16(output) : Float32Array.from(output);
        const best = scores.indexOf(Math.max(...scores));
        ctx.equal(best, label, "class");
        const seen = scores[best];
        const near = Math.abs(seen - probability) <= SCORE_TOLERANCE;
        ctx.assert(near, `probability ${seen}, wanted ${probability}`);
        return `class ${best} ${seen.toFixed(2)}`;
      } finally {
        await session.dispose();
      }
    },
  };
}

/** Samples of an 8-bit mono WAV file. Streamed files do not know their length, so the data go to the end of the file. */
function wav(bytes) {
  const view = new DataView(bytes);
  let at = 12;
  const tag = () => String.fromCharCode(...new Uint8Array(bytes, at, 4));
  let rate = 0;
  while (tag() !== "data") {
    if (tag() === "fmt ") rate = view.getUint32(at + 12, true);
    at += 8 + view.getUint32(at + 4, true);
  }
  return { rate, samples: Float32Array.from(new Uint8Array(bytes, at + 8), (byte) => (byte - 128) / 128) };
}

async function resample({ rate, samples }, to) {
  const length = Math.floor((samples.length * to) / rate);
  const context = new OfflineAudioContext(1, length, to);
  const buffer = context.createBuffer(1, samples.length, rate);
  buffer.copyToChannel(samples, 0);
  const source = Object.assign(context.createBufferSource(), { buffer });
  source.connect(context.destination);
  source.start();
  return (await context.startRendering()).getChannelData(0);
}

const silero = {
  name: "silero_vad_v5 on speech.wav",
  async run(ctx) {
    if (typeof OfflineAudioContext === "undefined") ctx.skip("no OfflineAudioContext here");
    const blob = await sample(ctx, "speech.wav");
    const audio = await resample(wav(await blob.arrayBuffer()), 16000);
    const session = await load(ctx, "silero_vad_v5");
    try {
      const [step, context] = [512, 64];
      const input = new Float32Array(context + step);
      let state = { data: new Float32Array(2 * 128), dims: [2, 1, 128] };
      const speech = [];
      for (let at = 0; at + step <= audio.length; at += step) {
        input.copyWithin(0, step);
        input.set(audio.subarray(at, at + step), context);
        const sr = { type: "int64", data: [16000n], dims: [] };
        const outputs = await session.run({ input: { data: input, dims: [1, context + step] }, state, sr });
        speech.push(outputs.output.data[0]);
        state = outputs.stateN;
      }
      const seconds = (i) => (i * step) / 16000;
      const on = speech.flatMap((p, i) => (p > 0.5 ? [i] : []));
      const share = on.length / speech.length;
      const [first, last] = [seconds(on[0] ?? 0), seconds((on.at(-1) ?? 0) + 1)];
      const note = `${(share * 100).toFixed(0)}% of the steps, ${first.toFixed(2)} s to ${last.toFixed(2)} s`;
      ctx.assert(Math.abs(share - 0.25) < 0.04, `speech in ${note}; wanted 25%`);
      ctx.assert(
        Math.abs(first - 2.1) < 0.2 && Math.abs(last - 3.5) < 0.2,
        `speech in ${note}; wanted 2.1 s to 3.5 s`,
      );
      const elsewhere = Math.max(...speech.filter((_, i) => seconds(i) < 1.8 || seconds(i) > 3.8));
      ctx.assert(elsewhere < 0.02, `${elsewhere} where nobody speaks`);
      return note;
    } finally {
      await session.dispose();
    }
  },
};

export default [
  yolox("skier.jpg", [
    ["person", 0.89],
    ["skis", 0.74],
  ]),
  yolox("bears.jpg", [
    ["teddy bear", 0.87],
    ["teddy bear", 0.84],
    ["teddy bear", 0.68],
  ]),
  yolox("baseball.jpg", [
    ["person", 0.86],
    ["person", 0.76],
    ["sports ball", 0.36],
    ["baseball glove", 0.32],
  ]),
  yolox("kitten.png", [["cat", 0.79]]),
  squeezenet("hummingbird.jpg", 94, 0.98),
  squeezenet("kitten.png", 281, 0.64),
  silero,
];
