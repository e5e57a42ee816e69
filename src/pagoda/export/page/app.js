// The page: draws images by seeds, walks between two of them. Nothing is fetched; everything lies in this file.

const element = (id) => document.getElementById(id);
const model = JSON.parse(element("facts").textContent);
const pause = () => new Promise((resolve) => setTimeout(resolve));

/** Bytes of an embedded block: base64 of gzip. The block is emptied, so that its text takes no memory. */
async function unpack(id) {
  const block = element(id);
  const text = atob(block.textContent.trim());
  block.textContent = "";
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const sessions = [];
async function load() {
  ort.env.wasm.numThreads = 1; // more would need headers that a file on a disk has none of
  ort.env.wasm.proxy = false;
  ort.env.logLevel = "error";
  ort.env.wasm.wasmBinary = await unpack("wasm");
  for (let i = 0; i < model.sizes.length; i++) sessions.push(await ort.InferenceSession.create(await unpack(`part-${i}`)));
}

// onnxruntime runs one call at a time: calls wait for each other here.
let last = Promise.resolve();
function inTurn(work) {
  const mine = last.then(work);
  last = mine.catch(() => {});
  return mine;
}

/** Image (C, r, r) as a Float32Array in about [-1, 1]. `to` and `mix` lead to another class. */
function run(z, label, size, to = label, mix = 0) {
  return inTurn(async () => {
    const b = model.base_size;
    const int64 = (value) => new ort.Tensor("int64", BigInt64Array.of(BigInt(value)), [1]);
    let state = { z: new ort.Tensor("float32", z, [1, model.channels, b, b]) };
    if (model.num_classes) {
      state = { ...state, labels: int64(label), to_labels: int64(to), mix: new ort.Tensor("float32", Float32Array.of(mix), [1]) };
    }
    for (let i = 0; i <= model.sizes.indexOf(size); i++) {
      const inputs = Object.fromEntries(sessions[i].inputNames.map((name) => [name, state[name]]));
      const outputs = await sessions[i].run(inputs);
      for (const [name, value] of Object.entries(outputs)) state[name.replace(/^next_/, "")] = value;
    }
    return state.image.data;
  });
}

/** As ImageData. A clamped array rounds halves to even and clamps, as Python does. */
function toPixels(data, size) {
  const pixels = new ImageData(size, size);
  const area = size * size;
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < 3; c++) {
      pixels.data[4 * i + c] = Math.fround(Math.fround(data[(model.channels === 1 ? 0 : c) * area + i] + 1) * 127.5);
    }
    pixels.data[4 * i + 3] = 255;
  }
  return pixels;
}

const noise = (seed) => noiseOfSeed(seed, model.channels * model.base_size ** 2);
const generate = async (seed, label, size) => toPixels(await run(noise(seed), label, size), size);
const walk = async (a, b, t, size) =>
  toPixels(await run(walkNoise(noise(a.seed), noise(b.seed), t), a.label, size, b.label, t), size);

// PNG files that say what made them, as `pagoda inspect` reads them.

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

async function toPng(canvas, facts) {
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  const bytes = new Uint8Array(await blob.arrayBuffer());
  const text = new TextEncoder().encode(`iTXtpagoda\0\0\0\0\0${JSON.stringify(facts)}`);
  const chunk = new Uint8Array(text.length + 8);
  const view = new DataView(chunk.buffer);
  let crc = 0xffffffff;
  for (const byte of text) crc = CRC[(crc ^ byte) & 255] ^ (crc >>> 8);
  view.setUint32(0, text.length - 4);
  chunk.set(text, 4);
  view.setUint32(text.length + 4, (crc ^ 0xffffffff) >>> 0);
  const head = 33; // the signature and IHDR, which stays first
  return new Blob([bytes.subarray(0, head), chunk, bytes.subarray(head)], { type: "image/png" });
}

function describe(kind, images, size, settings) {
  return {
    version: model.version, kind, model: model.model, resolution: size, seeds: images.map((image) => image.seed),
    labels: model.num_classes ? images.map((image) => image.label) : null, batch_size: 1, ...settings,
    torch: `onnxruntime-web ${model.runtime}`, device: "wasm", dtype: "float32", weights: model.weights,
  };
}

async function download(canvas, facts, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await toPng(canvas, facts));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function enlarged(canvas, scale) {
  const large = document.createElement("canvas");
  [large.width, large.height] = [canvas.width * scale, canvas.height * scale];
  const context = large.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(canvas, 0, 0, large.width, large.height);
  return large;
}

// What is on the page.

let shown = []; // {seed, label, canvas, button}
let picked = [];
let drawing = 0;

const say = (text) => { element("status").textContent = text; };
const className = (label) => (label < 0 ? "no class" : (model.class_names?.[label] ?? `class ${label}`));
const sizeOf = () => Number(new FormData(element("controls")).get("size"));

function fail(error) {
  say(`This browser could not do it: ${error.message ?? error}. A current Chrome, Edge, Firefox or Safari can.`);
  document.body.dataset.state = "failed";
  console.error(error);
}

function addOption(select, value, text) {
  select.append(new Option(text, value));
}

function build() {
  const labels = element("label");
  if (model.num_classes) {
    addOption(labels, "turn", "every class in turn");
    for (let label = 0; label < model.num_classes; label++) addOption(labels, label, className(label));
    addOption(labels, -1, "no class");
  } else {
    labels.closest("label").remove();
  }
  for (const size of model.sizes) {
    const line = document.createElement("label");
    const radio = Object.assign(document.createElement("input"), { type: "radio", name: "size", value: size });
    radio.checked = size === model.sizes.at(-1);
    line.append(radio, `${size} px`);
    element("sizes").append(line);
  }
}

function labelOf(seed) {
  if (!model.num_classes) return -1;
  const chosen = element("label").value;
  return chosen === "turn" ? seed % model.num_classes : Number(chosen);
}

/** One square button an image, in the order of the seeds. */
function layOut(images, size) {
  element("grid").replaceChildren(...images.map((image) => {
    const canvas = Object.assign(document.createElement("canvas"), { width: size, height: size });
    const button = Object.assign(document.createElement("button"), { type: "button" });
    button.setAttribute("aria-pressed", "false");
    button.setAttribute("aria-label", `seed ${image.seed}${model.num_classes ? `, ${className(image.label)}` : ""}`);
    button.title = button.getAttribute("aria-label");
    button.append(canvas);
    Object.assign(image, { canvas, button });
    button.addEventListener("click", () => pick(image));
    return button;
  }));
}

async function draw() {
  const turn = ++drawing;
  const first = Number(element("seed").value);
  if (!Number.isSafeInteger(first) || first < 0 || element("seed").value === "") {
    say("A seed is a whole number, 0 or larger.");
    return;
  }
  const size = sizeOf();
  const images = Array.from({ length: Number(element("count").value) }, (_, i) => ({ seed: first + i, label: labelOf(first + i) }));
  shown = images;
  picked = [];
  showWalk();
  layOut(images, size);
  document.body.dataset.state = "drawing";
  let busy = 0;
  for (const [i, image] of images.entries()) {
    const started = performance.now();
    const pixels = await generate(image.seed, image.label, size);
    if (turn !== drawing) return; // another drawing has begun
    image.canvas.getContext("2d").putImageData(pixels, 0, 0);
    busy += performance.now() - started;
    say(`${i + 1} of ${images.length} images, ${Math.round(busy / (i + 1))} ms each`);
    await pause();
    if (turn !== drawing) return;
  }
  say(`${images.length} images of ${size} px, ${Math.max(1, Math.round(busy / images.length))} ms each, on this device`);
  document.body.dataset.state = "ready";
}

function pick(image) {
  picked = picked.includes(image) ? picked.filter((other) => other !== image) : [...picked, image].slice(-2);
  for (const other of shown) other.button.setAttribute("aria-pressed", String(picked.includes(other)));
  showWalk();
}

let wanted = null;
function showWalk() {
  const ready = picked.length === 2;
  element("walk").hidden = !ready;
  element("hint").hidden = ready;
  if (!ready) return;
  const [a, b] = picked;
  const name = (image) => `seed ${image.seed}${model.num_classes ? `, ${className(image.label)}` : ""}`;
  element("from").textContent = name(a);
  element("to").textContent = name(b);
  element("position").value = 0.5;
  step();
}

/** Draw the slider's position; while one is being drawn, only the newest wish is kept. */
async function step() {
  const idle = wanted === null;
  wanted = Number(element("position").value);
  if (!idle) return;
  while (true) {
    const [a, b] = picked;
    if (!b) break;
    const t = wanted;
    const size = a.canvas.width;
    element("position").setAttribute("aria-valuetext", `${Math.round(100 * t)} % of the way`);
    const pixels = await walk(a, b, t, size);
    const canvas = element("between");
    [canvas.width, canvas.height] = [size, size];
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    canvas.dataset.position = t;
    await pause();
    if (wanted === t && picked[0] === a && picked[1] === b) break;
  }
  wanted = null;
}

function gridCanvas(columns) {
  const size = shown[0].canvas.width;
  const rows = Math.ceil(shown.length / columns);
  const canvas = Object.assign(document.createElement("canvas"), { width: columns * (size + 1) + 1, height: rows * (size + 1) + 1 });
  const context = canvas.getContext("2d");
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  shown.forEach((image, i) =>
    context.drawImage(image.canvas, 1 + (i % columns) * (size + 1), 1 + Math.floor(i / columns) * (size + 1)));
  return canvas;
}

async function saveGrid() {
  const columns = Math.ceil(Math.sqrt(shown.length));
  const grid = gridCanvas(columns);
  const scale = Math.max(1, Math.round(768 / grid.width));
  const size = shown[0].canvas.width;
  await download(enlarged(grid, scale), describe("grid", shown, size, { columns, scale }), `${model.name}-${shown[0].seed}.png`);
}

async function saveWalk() {
  const canvas = element("between");
  const position = Number(canvas.dataset.position);
  await download(canvas, describe("walk", picked, canvas.width, { position }), `${model.name}-walk.png`);
}

async function start() {
  build();
  const started = performance.now();
  await load();
  model.seconds_to_load = (performance.now() - started) / 1000;
  element("controls").addEventListener("submit", (event) => { event.preventDefault(); draw().catch(fail); });
  element("controls").addEventListener("change", (event) => { if (event.target !== element("seed")) draw().catch(fail); });
  element("more").addEventListener("click", () => {
    element("seed").value = Math.floor(Math.random() * 1e6);
    draw().catch(fail);
  });
  element("save").addEventListener("click", () => saveGrid().catch(fail));
  element("save-walk").addEventListener("click", () => saveWalk().catch(fail));
  element("position").addEventListener("input", () => step().catch(fail));
  for (const control of document.querySelectorAll("[disabled]")) control.disabled = false;
  await draw();
}

// For scripts, and for those who try things in the browser's console.
globalThis.pagoda = { model, noiseOfSeed, walkNoise, generate, walk, toPng, describe };

start().catch(fail);
