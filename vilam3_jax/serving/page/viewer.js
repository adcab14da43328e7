// Shows a 2-D image, or slices of a volume with the mask of an expert, as rendered by the server.

import { json, request } from "./api.js";
import { $, element, millilitres, save } from "./dom.js";

const CACHED = 160; // bitmaps
const AHEAD = 2; // slices that are fetched before they are asked for
const SIDES = {
  axial: { top: "A", left: "R", right: "L", bottom: "P" },
  coronal: { top: "S", left: "R", right: "L", bottom: "I" },
  sagittal: { top: "S", left: "A", right: "P", bottom: "I" },
};
const PLANES = Object.keys(SIDES);

const bitmaps = new Map(); // URL to a promise of a bitmap

function bitmap(url) {
  let found = bitmaps.get(url);
  if (found) {
    bitmaps.delete(url);
  } else {
    found = request(url)
      .then((response) => response.blob())
      .then((blob) => createImageBitmap(blob));
    found.catch(() => bitmaps.delete(url));
  }
  bitmaps.set(url, found); // the last one used is at the end
  for (const old of bitmaps.keys()) {
    if (bitmaps.size <= CACHED) break;
    bitmaps.get(old).then((image) => image.close(), () => {});
    bitmaps.delete(old);
  }
  return found;
}

export class Viewer {
  constructor({ onChange, onError, use3d }) {
    this.file = this.info = this.mask = null;
    this.use3d = use3d;
    this.onChange = onChange;
    this.onError = onError;
    this.places = {};
    this.plane = "axial";
    this.wheel = 0;
    this.listen();
  }

  get isVolume() {
    return this.info?.kind === "volume";
  }

  get index() {
    return this.places[this.plane];
  }

  // What the model is shown of the file, as options of an image part.
  get options() {
    const modality = $("modality").value;
    const place = this.isVolume ? { axis: this.plane, slice: this.index } : {};
    return modality ? { ...place, modality } : place;
  }

  get name() {
    return this.isVolume ? `${this.plane} slice ${this.index}` : "this image";
  }

  // Another file on the same grid, such as another sequence of a head: place, windows and mask stay.
  async turnTo(file) {
    const modality = $("modality").value;
    const info = await json(`/v1/files/${file}/view${modality ? `?modality=${modality}` : ""}`);
    const same = info.kind === "volume" && info.shape.every((size, axis) => size === this.info.shape[axis]);
    if (!same) throw new Error(`All sequences need ${this.info.shape.join(" × ")} voxels, as the first one has.`);
    this.file = file;
    this.describe(info);
    await this.redraw();
  }

  async open(file) {
    const info = await json(`/v1/files/${file}/view`);
    for (const one of bitmaps.values()) one.then((image) => image.close(), () => {});
    bitmaps.clear();
    this.file = file;
    $("modality").value = "";
    $("window").value = "model";
    this.places = {};
    this.plane = info.plane ?? "axial";
    for (const [name, plane] of Object.entries(info.planes ?? {})) this.places[name] = Math.floor(plane.slices / 2);
    this.describe(info);
    this.clearMask();
    $("viewer").hidden = false;
    this.choose3d(false);
    await this.show();
  }

  describe(info) {
    this.info = info;
    const volume = this.isVolume;
    for (const id of ["planes", "slider", "keys"]) $(id).hidden = !volume;
    $("view").hidden = !volume || !this.use3d;
    $("stage").tabIndex = volume ? 0 : -1;
    $("window-field").hidden = !volume || !Object.keys(info.windows).length;
    if ($("window-field").hidden) $("window").value = "model";
    const size = volume ? info.shape.join(" × ") + " voxels" : `${info.width} × ${info.height} pixels`;
    const stated = info.modality === "unknown" ? "modality unknown" : info.modality;
    const facts = [`${stated}, ${size}`, ...info.notes];
    if (volume) facts.push(`The model sees it ${info.display.startsWith("between") ? "" : "in its "}${info.display}.`);
    if (volume && !this.use3d) facts.push("Slices are rendered by the server; the 3-D viewer NiiVue is not installed.");
    $("facts").replaceChildren(...facts.map((text) => element("li", {}, text)));
  }

  listen() {
    for (const radio of document.querySelectorAll("[name=plane]")) {
      radio.addEventListener("change", () => this.turn(radio.value));
    }
    for (const radio of document.querySelectorAll("[name=view]")) {
      radio.addEventListener("change", () => this.choose3d(radio.value === "niivue"));
    }
    $("index").addEventListener("input", () => this.move(Number($("index").value)));
    $("window").addEventListener("change", () => this.redraw());
    $("modality").addEventListener("change", () => this.state());
    $("mask-on").addEventListener("change", () => this.redraw());
    $("opacity").addEventListener("input", () => this.redraw());
    $("largest").addEventListener("click", () => this.move(this.mask.largest[this.plane]));
    $("save-overlay").addEventListener("click", () => this.saveOverlay());
    $("save-mask").addEventListener("click", () => this.saveMask());
    $("stage").addEventListener("keydown", (event) => this.key(event));
    $("stage").addEventListener(
      "wheel",
      (event) => {
        if (!this.isVolume || event.ctrlKey) return; // ctrl zooms the page
        event.preventDefault();
        // A notch of a wheel is one slice; a touchpad sends many small steps.
        const isNotch = event.deltaMode !== 0 || Math.abs(event.deltaY) >= 50;
        this.wheel = isNotch ? Math.sign(event.deltaY) : this.wheel + event.deltaY / 50;
        const steps = Math.trunc(this.wheel);
        this.wheel -= steps;
        if (steps) this.move(this.index - steps);
      },
      { passive: false },
    );
  }

  key(event) {
    if (!this.isVolume || event.altKey || event.ctrlKey || event.metaKey) return;
    const last = this.info.planes[this.plane].slices - 1;
    const steps = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10 };
    if (event.key in steps) this.move(this.index + steps[event.key]);
    else if (event.key === "Home") this.move(0);
    else if (event.key === "End") this.move(last);
    else if (["1", "2", "3"].includes(event.key)) this.turn(PLANES[event.key - 1]);
    else return;
    event.preventDefault();
  }

  turn(plane) {
    this.plane = plane;
    this.show();
  }

  move(index) {
    const last = this.info.planes[this.plane].slices - 1;
    this.places[this.plane] = Math.max(0, Math.min(last, index));
    this.show();
  }

  // The user states the modality.
  async state() {
    const modality = $("modality").value;
    try {
      this.describe(await json(`/v1/files/${this.file}/view${modality ? `?modality=${modality}` : ""}`));
      this.onError("");
    } catch (error) {
      $("modality").value = "";
      this.onError(error.message);
    }
    await this.redraw();
  }

  sliceUrl(index) {
    const query = new URLSearchParams();
    if (this.isVolume) {
      query.set("axis", this.plane);
      query.set("index", index);
      if ($("window").value !== "model") query.set("window", $("window").value);
    }
    if ($("modality").value) query.set("modality", $("modality").value);
    return `/v1/files/${this.file}/slice?${query}`;
  }

  maskUrl(index) {
    if (!this.mask || !$("mask-on").checked) return null;
    return `/v1/masks/${this.mask.id}/slice?axis=${this.plane}&index=${index}`;
  }

  async show() {
    if (!this.file) return;
    const volume = this.isVolume;
    if (volume) {
      const { slices } = this.info.planes[this.plane];
      document.querySelector(`[name=plane][value=${this.plane}]`).checked = true;
      $("index").max = slices - 1;
      $("index").value = this.index;
      $("index").setAttribute("aria-valuetext", `${this.index} of 0 to ${slices - 1}`);
      $("place").textContent = `Slice ${this.index} of 0 to ${slices - 1}`;
    }
    this.onChange();
    // While slices load, only the last one that was asked for is fetched.
    if (this.busy) {
      this.stale = true;
      return;
    }
    this.busy = true;
    try {
      do {
        this.stale = false;
        const urls = [this.sliceUrl(this.index), this.maskUrl(this.index)];
        const images = await Promise.all(urls.map((url) => url && bitmap(url)));
        this.draw(...images);
      } while (this.stale);
      this.ahead();
    } catch (error) {
      this.onError(error.message);
    } finally {
      this.busy = false;
    }
  }

  ahead() {
    if (!this.isVolume) return;
    const last = this.info.planes[this.plane].slices - 1;
    for (let step = 1; step <= AHEAD; step += 1) {
      for (const index of [this.index + step, this.index - step]) {
        if (index < 0 || index > last) continue;
        for (const url of [this.sliceUrl(index), this.maskUrl(index)]) if (url) bitmap(url).catch(() => {});
      }
    }
  }

  draw(slice, mask) {
    const canvas = $("canvas");
    const plane = this.info.planes?.[this.plane];
    const [across, down] = plane ? [plane.width_mm, plane.height_mm] : [slice.width, slice.height];
    // Voxels need not be square; the picture keeps the patient's proportions.
    const scale = Math.min(1024 / across, 1024 / down);
    canvas.width = Math.max(1, Math.round(across * scale));
    canvas.height = Math.max(1, Math.round(down * scale));
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(slice, 0, 0, canvas.width, canvas.height);
    if (mask) {
      context.globalAlpha = Number($("opacity").value) / 100;
      context.imageSmoothingEnabled = false;
      context.drawImage(mask, 0, 0, canvas.width, canvas.height);
      context.globalAlpha = 1;
    }
    const where = this.isVolume ? `${this.plane} slice ${this.index}` : "uploaded image";
    const names = mask ? ` with the mask of ${this.mask.expert}` : "";
    canvas.setAttribute("aria-label", `${where}${names}`);
    canvas.dataset.shown = `${where}${mask ? " mask" : ""}`;
    const sides = this.isVolume ? SIDES[this.plane] : {};
    for (const side of ["top", "left", "right", "bottom"]) {
      document.querySelector(`.side.${side}`).textContent = sides[side] ?? "";
    }
  }

  // `mask` is that of an expert's result on one of `files`.
  async showMask(mask, expert, files) {
    if (!files.includes(this.file) || mask.shape.some((size, axis) => size !== this.info.shape[axis])) {
      this.onError("This mask belongs to another image.");
      return;
    }
    this.mask = { ...mask, expert };
    $("mask").hidden = false;
    $("mask-on").checked = true;
    $("mask-title").textContent = `Mask of ${expert}`;
    $("legend").replaceChildren(...legend(mask));
    await this.redraw();
  }

  async redraw() {
    await this.show();
    if (this.in3d) await this.draw3d();
  }

  clearMask() {
    this.mask = null;
    $("mask").hidden = true;
    if (this.file) this.show();
  }

  saveOverlay() {
    const name = this.isVolume ? `${this.plane}-${this.index}` : "image";
    $("canvas").toBlob((blob) => save(blob, `overlay-${name}.png`));
  }

  async saveMask() {
    try {
      const response = await request(`/v1/masks/${this.mask.id}`);
      const name = this.mask.expert.toLowerCase().match(/[a-z0-9]+/g).join("-");
      save(await response.blob(), `mask-${name}.nii.gz`);
    } catch (error) {
      this.onError(error.message);
    }
  }

  async choose3d(on) {
    this.in3d = on && this.use3d && this.isVolume;
    document.querySelector(`[name=view][value=${this.in3d ? "niivue" : "slices"}]`).checked = true;
    for (const id of ["stage", "slider", "keys"]) $(id).hidden = this.in3d || !this.isVolume;
    $("stage").hidden = this.in3d;
    $("planes").hidden = this.in3d || !this.isVolume;
    $("niivue-box").hidden = !this.in3d;
    if (this.in3d) await this.draw3d();
  }

  // The values that are black and white.
  get range() {
    const window = this.info.windows[$("window").value];
    return window ? [window[0] - window[1] / 2, window[0] + window[1] / 2] : this.info.range;
  }

  async draw3d() {
    try {
      const { draw } = await import("./niivue.js");
      const mask = $("mask-on").checked ? this.mask : null;
      await draw($("niivue"), this.file, this.range, mask, Number($("opacity").value) / 100);
      this.onError("");
    } catch (error) {
      this.onError(`The 3-D viewer does not start: ${error.message}`);
      await this.choose3d(false);
    }
  }
}

export function legend(mask) {
  if (!mask.labels.length) return [element("li", {}, "Nothing was found.")];
  return mask.labels.map((label) => {
    const swatch = element("span", { class: "swatch", "aria-hidden": "true" });
    swatch.style.backgroundColor = label.colour;
    return element("li", {}, swatch, `${label.name}, ${millilitres(label.volume_ml)}`);
  });
}
