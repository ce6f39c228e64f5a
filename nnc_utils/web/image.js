// An image as training reads it (nnc_utils/images.py): turned as EXIF says, white under transparent pixels,
// the middle square, resized with Pillow's bilinear filter to the last bit.
"use strict";

const FRACTION_BITS = 22; // of a weight, as in Pillow

/** A file as a whole image, opaque: ImageData. It rejects what the browser cannot read. */
async function decode(file) {
  const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  if (pixels.data[3] !== 255) throw new Error("larger than this browser's canvas");
  return pixels;
}

/** The image's channels, one array of bytes each: grey, or red, green and blue. */
function planesOf({ data, width, height }, channels) {
  const planes = Array.from({ length: channels }, () => new Uint8Array(width * height));
  for (let i = 0; i < width * height; i++) {
    const [red, green, blue] = [data[4 * i], data[4 * i + 1], data[4 * i + 2]];
    if (channels === 1) planes[0][i] = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16;
    else planes.forEach((plane, c) => (plane[i] = data[4 * i + c]));
  }
  return planes;
}

/** For each output pixel of one axis: where the inputs begin, and their weights. */
function weightsOf(length, low, high, size) {
  const scale = (high - low) / size;
  const reach = Math.max(scale, 1); // antialiasing: an output pixel sees all that falls into it
  return Array.from({ length: size }, (_, place) => {
    const center = low + (place + 0.5) * scale;
    const begin = Math.max(Math.trunc(center - reach + 0.5), 0);
    const end = Math.min(Math.trunc(center + reach + 0.5), length);
    const weights = [];
    for (let x = begin; x < end; x++) weights.push(Math.max(1 - Math.abs((x - center + 0.5) / reach), 0));
    const sum = weights.reduce((a, b) => a + b, 0);
    return { begin, weights: weights.map((w) => Math.trunc(0.5 + (w / sum) * 2 ** FRACTION_BITS)) };
  });
}

/** Resize the rows of a plane: `count` rows of `width` pixels become as many of taps.length. */
function resizeRows(plane, width, count, taps) {
  const result = new Uint8Array(count * taps.length);
  for (let y = 0; y < count; y++) {
    taps.forEach(({ begin, weights }, x) => {
      let sum = 2 ** (FRACTION_BITS - 1);
      for (let i = 0; i < weights.length; i++) sum += plane[y * width + begin + i] * weights[i];
      result[y * taps.length + x] = Math.min(sum >> FRACTION_BITS, 255);
    });
  }
  return result;
}

function transposed(plane, width, height) {
  const result = new Uint8Array(plane.length);
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) result[x * height + y] = plane[y * width + x];
  return result;
}

/** The middle square of an image, resized: a plane for each channel. */
function read(image, channels, size) {
  const { width, height } = image;
  const side = Math.min(width, height);
  const [left, top] = [(width - side) / 2, (height - side) / 2];
  const across = weightsOf(width, left, left + side, size);
  const down = weightsOf(height, top, top + side, size);
  return planesOf(image, channels).map((plane) => {
    const narrow = transposed(resizeRows(plane, width, height, across), size, height);
    return transposed(resizeRows(narrow, height, size, down), size, size);
  });
}

/** Planes as a network's input: each channel (pixel / 255 - mean) / std. */
function normalized(planes, { mean, std }) {
  return Float32Array.from(planes.flatMap((plane, c) => Array.from(plane, (v) => (v / 255 - mean[c]) / std[c])));
}
