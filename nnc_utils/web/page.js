// The page: which networks there are, what they say about an image, and what they cost.
"use strict";

const ROUNDS = 11; // of timing; the median counts
const BATCH_MS = 25; // runs are timed in batches of so long: the browser's timer resolves 0.1 ms
const MOST_SHOWN = 10; // classes
const AGAIN = "Put the whole folder on the server as it was written, or export it again.";

const $ = (id) => document.getElementById(id);
const pad = $("pad").getContext("2d", { willReadFrequently: true });
let networks = []; // as in networks.json, each with `session`, once it is loaded, and its row
let chosen = null; // the network that answers
let image = null; // ImageData of what was drawn or chosen
let asked = 0; // images so far: an answer for an earlier one is not shown
let fault = null; // why the chosen network does not answer
let turn = Promise.resolve();

/** One thing at a time: nothing is computed while something is loaded or timed. */
function inTurn(work) {
  const result = turn.then(work);
  turn = result.catch(() => {});
  return result;
}

/** Say what went wrong; without an error what is still wrong with the chosen network, or nothing. */
function complain(error) {
  const said = error ?? fault;
  $("message").textContent = said ? said.message || String(said) : "";
  $("message").hidden = !said;
}

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e6 ? 3 : 2)} MB`;
const pause = () => new Promise((resolve) => setTimeout(resolve, 0));
const median = (values) => values.toSorted((a, b) => a - b)[values.length >> 1];

// --- Loading -------------------------------------------------------------------------------------

/** The content of a gzipped file of this folder, once its length is right; an Error that says what to do. */
async function unpacked({ file, bytes }) {
  const response = await fetch(file, { cache: "no-cache" }).catch(() => ({ status: "no answer" }));
  if (!response.ok) throw new Error(`${file} is missing on the server (${response.status}). ${AGAIN}`);
  const nothing = () => new ArrayBuffer(0); // where the connection ends early, or gzip's checksum is wrong
  let content = await response.arrayBuffer().catch(nothing);
  const [first, second] = new Uint8Array(content, 0, Math.min(content.byteLength, 2));
  if (first === 0x1f && second === 0x8b) { // else the server has unpacked it
    const stream = new Blob([content]).stream().pipeThrough(new DecompressionStream("gzip"));
    content = await new Response(stream).arrayBuffer().catch(nothing);
  }
  if (content.byteLength !== bytes) throw new Error(`${file} is cut off or damaged. ${AGAIN}`);
  return content;
}

/** A network's session; it is loaded once. */
async function opened(network) {
  network.session ??= await ort.InferenceSession.create(await unpacked(network), { executionProviders: ["wasm"] });
  return network.session;
}

async function start() {
  if (location.protocol === "file:") {
    throw new Error("A browser opens no networks from a file: run `python -m http.server` in this folder, " +
      "then open http://localhost:8000");
  }
  if (!window.DecompressionStream || ![].toSorted) {
    throw new Error("This browser is too old: Chrome or Edge 110, Firefox 115 or Safari 16.4 is needed.");
  }
  const response = await fetch("networks.json", { cache: "no-cache" }).catch(() => ({}));
  if (!response.ok || !window.ort) {
    throw new Error(`${window.ort ? "networks.json" : "ort.wasm.min.js"} is missing on the server. ${AGAIN}`);
  }
  const described = await response.json().catch(() => { throw new Error(`networks.json is damaged. ${AGAIN}`); });
  networks = described.networks;
  networks.forEach(addRow);
  $("faster").hidden = networks.length === 1;
  if (networks.length > 1) $("measure").textContent = "Measure all, side by side";
  $("how").textContent = `One image in WebAssembly (onnxruntime-web ${described.runtime.version}), on one thread: median of ` +
    `${ROUNDS} batches of runs. ONNX Runtime itself is ${megabytes(described.runtime.gzip_bytes)} gzipped, loaded once.`;
  const bright = networks[0].mean.reduce((a, b) => a + b, 0) / networks[0].mean.length;
  $("light").checked = bright > 0.5; // draw on what the training images have most of
  clear();
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = { mjs: new URL("ort-wasm-simd-threaded.js", document.baseURI).href };
  ort.env.wasm.wasmBinary = await unpacked(described.runtime);
  document.querySelectorAll("#networks input").forEach((radio) => (radio.disabled = false));
  await choose(networks[0]);
}

// --- Answers -------------------------------------------------------------------------------------

/** Let a network answer from now on. */
async function choose(network) {
  chosen = network;
  networks.forEach((other) => other.row.classList.toggle("chosen", other === network));
  $("measure").disabled = true;
  complain((fault = null));
  forget("Loading the network …");
  try {
    await inTurn(() => chosen === network && opened(network));
    if (chosen !== network) return; // another one was chosen meanwhile
    await classify();
    await inTurn(() => network.time.textContent || measure([network]));
  } catch (error) {
    notTimed();
    if (chosen !== network) return;
    forget("This network cannot be loaded.");
    complain((fault = error));
  }
  if (chosen === network) $("measure").disabled = false;
}

/** Take an image file; where it cannot be read, say so. */
async function show(file) {
  complain(null);
  const mine = ++asked;
  try {
    const decoded = await decode(file);
    if (mine !== asked) return; // another image came meanwhile
    image = decoded;
  } catch {
    if (mine !== asked) return;
    clear();
    complain(`${file.name || "This"} is no image that this browser can read: PNG, JPEG, WebP and GIF are.`);
    return;
  }
  const side = Math.min(image.width, image.height);
  const whole = document.createElement("canvas");
  [whole.width, whole.height] = [image.width, image.height];
  whole.getContext("2d").putImageData(image, 0, 0);
  pad.drawImage(whole, (image.width - side) / 2, (image.height - side) / 2, side, side, 0, 0, pad.canvas.width, pad.canvas.height);
  pen.pasted = true;
  await classify();
}

/** What the chosen network says about the image; the probability of each class, or null without an image. */
async function classify() {
  if (!image || !chosen?.session) {
    forget(chosen?.session ? "Draw something, or choose an image." : $("answer").textContent);
    return null;
  }
  const [network, given, { channels, size }] = [chosen, image, chosen];
  const planes = read(image, channels, size);
  const input = new ort.Tensor("float32", normalized(planes, network), [1, channels, size, size]);
  const { logits } = await inTurn(() => network.session.run({ images: input }));
  const largest = Math.max(...logits.data);
  const powers = Array.from(logits.data, (logit) => Math.exp(logit - largest));
  const sum = powers.reduce((a, b) => a + b, 0);
  const probabilities = powers.map((power) => power / sum);
  if (network === chosen && given === image) {
    showSeen(planes, size);
    showClasses(network.classes, probabilities);
  }
  return probabilities;
}

function forget(text) {
  $("answer").textContent = text;
  $("classes").replaceChildren();
  $("seen-figure").hidden = true;
}

function showSeen(planes, size) {
  const seen = new ImageData(size, size);
  for (let i = 0; i < size * size; i++) {
    for (let c = 0; c < 3; c++) seen.data[4 * i + c] = planes[planes.length === 1 ? 0 : c][i];
    seen.data[4 * i + 3] = 255;
  }
  [$("seen").width, $("seen").height] = [size, size];
  $("seen").getContext("2d").putImageData(seen, 0, 0);
  $("seen-size").textContent = `${size} × ${size} pixels, ${planes.length === 1 ? "grey" : "colour"}`;
  $("seen-figure").hidden = false;
}

function showClasses(names, probabilities) {
  const percent = (p) => `${(100 * p).toFixed(1)} %`;
  const order = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]);
  const [best, shown] = [order[0], order.slice(0, MOST_SHOWN)];
  $("answer").textContent = `${names[best]}, ${percent(probabilities[best])}`;
  if (names.length <= MOST_SHOWN) shown.sort((a, b) => a - b); // few classes keep their places
  $("classes").replaceChildren(...shown.map((which) => {
    const [line, name, track, bar, number] = ["li", "span", "div", "div", "span"].map((tag) => document.createElement(tag));
    line.classList.toggle("best", which === best);
    [name.className, track.className, bar.className, number.className] = ["name", "track", "bar", "number"];
    [name.textContent, number.textContent] = [names[which], percent(probabilities[which])];
    bar.style.width = percent(probabilities[which]).replace(" ", "");
    track.append(bar);
    line.append(name, track, number);
    return line;
  }));
}

// --- Costs ---------------------------------------------------------------------------------------

/** A network's line in the table, with the switch to it. */
function addRow(network, place) {
  network.row = $("networks").insertRow();
  const label = document.createElement("label");
  const radio = Object.assign(document.createElement("input"), { type: "radio", name: "network", checked: place === 0, disabled: true });
  radio.addEventListener("change", () => choose(network));
  label.append(radio, network.label);
  const head = Object.assign(document.createElement("th"), { scope: "row", role: "rowheader" });
  network.row.role = "row";
  head.append(label);
  network.row.append(head);
  const names = Array.from(document.querySelectorAll("thead th"), ({ textContent }) => textContent).slice(1);
  const cells = names.map((name) => {
    const cell = network.row.insertCell();
    cell.dataset.name = name; // stands before the number where the screen is narrow
    cell.setAttribute("role", "cell"); // which a narrow screen's layout takes away
    return cell;
  });
  const sizes = [network.precision, megabytes(network.bytes), megabytes(network.gzip_bytes)];
  sizes.forEach((text, which) => (cells[which].textContent = text));
  [network.time, network.factor] = cells.slice(3);
  network.factor.hidden = networks.length === 1;
}

/** Time one image: in each round a batch of each network, so that a machine's changes of speed weigh on all alike.
 *  The milliseconds of each round, for each network; the first network is what the others are compared with. */
async function measure(those, rounds = ROUNDS) {
  const timed = [];
  for (const network of those) {
    network.time.textContent = "measuring …";
    const session = await opened(network);
    const shape = [1, network.channels, network.size, network.size];
    const input = new ort.Tensor("float32", new Float32Array(shape.reduce((a, b) => a * b)).fill(0.5), shape);
    const batch = async (runs) => {
      const begin = performance.now();
      for (let run = 0; run < runs; run++) await session.run({ images: input });
      return (performance.now() - begin) / runs;
    };
    await batch(3); // warm
    timed.push({ batch, runs: Math.ceil(BATCH_MS / Math.max(await batch(5), 0.01)), ms: [] });
  }
  for (let round = 0; round < rounds; round++) {
    for (const { batch, runs, ms } of timed) {
      await pause(); // lets the page breathe
      await batch(1);
      ms.push(await batch(runs));
    }
  }
  timed.forEach(({ ms }, which) => {
    those[which].time.textContent = `${median(ms).toPrecision(3)} ms`;
    const ratio = median(ms.map((value, round) => timed[0].ms[round] / value));
    those[which].factor.textContent = those.length > 1 ? `${ratio.toFixed(ratio < 10 ? 2 : 1)}×` : "";
  });
  return timed.map(({ ms }) => ms);
}

function notTimed() {
  networks.forEach(({ time }) => { if (time.textContent === "measuring …") time.textContent = ""; });
}

$("measure").addEventListener("click", async () => {
  $("measure").disabled = true;
  complain(null);
  await inTurn(() => measure(networks)).catch((error) => {
    notTimed();
    complain(error);
  });
  $("measure").disabled = false;
});

// --- Drawing -------------------------------------------------------------------------------------

const pen = { x: 140, y: 140, down: false, dragged: false, pasted: false }; // down: by keyboard; pasted: on an image

const colours = () => ($("light").checked ? ["white", "black"] : ["black", "white"]);

function blank() {
  [pad.fillStyle] = colours();
  pad.fillRect(0, 0, pad.canvas.width, pad.canvas.height);
  pen.pasted = false;
  complain(null);
}

function clear() {
  blank();
  asked++;
  image = null;
  pen.down = false;
  showPen();
  return classify();
}

/** Where the pen is, for those who move it with the keyboard. */
function showPen() {
  $("pen").style.left = `${(100 * pen.x) / pad.canvas.width}%`;
  $("pen").style.top = `${(100 * pen.y) / pad.canvas.height}%`;
  $("pen").classList.toggle("down", pen.down);
}

function lineTo(x, y) {
  if (pen.pasted) blank();
  pad.strokeStyle = colours()[1];
  const pixel = pad.canvas.width / (chosen?.size ?? 28);
  [pad.lineWidth, pad.lineCap] = [Math.max(22, 1.5 * pixel), "round"]; // or few pixels would hardly see it
  pad.beginPath();
  pad.moveTo(pen.x, pen.y);
  pad.lineTo(x, y);
  pad.stroke();
  [pen.x, pen.y] = [x, y];
  showPen();
}

function drawn() {
  asked++;
  image = pad.getImageData(0, 0, pad.canvas.width, pad.canvas.height);
  return classify();
}

function placeOf(event) {
  const scale = pad.canvas.width / pad.canvas.clientWidth;
  return [event.offsetX * scale, event.offsetY * scale];
}

pad.canvas.addEventListener("pointerdown", (event) => {
  if (event.button || !event.isPrimary) return; // the other buttons, and a second finger
  pad.canvas.setPointerCapture(event.pointerId);
  [pen.x, pen.y] = placeOf(event);
  pen.dragged = true;
  lineTo(pen.x, pen.y);
});
pad.canvas.addEventListener("pointermove", (event) => {
  if (pen.dragged) lineTo(...placeOf(event));
});
for (const end of ["pointerup", "pointercancel"]) {
  pad.canvas.addEventListener(end, () => {
    if (pen.dragged) drawn();
    pen.dragged = false;
  });
}
pad.canvas.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: [-10, 0], ArrowRight: [10, 0], ArrowUp: [0, -10], ArrowDown: [0, 10] }[event.key];
  if (step) {
    const within = (value) => Math.min(Math.max(value, 10), pad.canvas.width - 10);
    const [x, y] = [within(pen.x + step[0]), within(pen.y + step[1])];
    if (pen.down) lineTo(x, y);
    [pen.x, pen.y] = [x, y];
    if (pen.down) drawn();
    showPen();
  } else if (event.key === " ") {
    pen.down = !pen.down;
    if (pen.down) lineTo(pen.x, pen.y);
    if (pen.down) drawn();
    showPen();
  } else if (event.key === "Delete" || event.key === "Backspace") {
    clear();
  } else return;
  event.preventDefault();
});
$("clear").addEventListener("click", clear);
$("light").addEventListener("change", clear);
$("file").addEventListener("change", ({ target }) => {
  if (target.files.length) show(target.files[0]);
  target.value = ""; // so that the same file can be chosen again
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
addEventListener("dragleave", () => document.body.classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  if (event.dataTransfer.files.length) show(event.dataTransfer.files[0]);
});

start().catch((error) => {
  forget("The page could not start.");
  complain(error);
});
