// The 3-D view: the volume and the mask in NiiVue, a file that `make page` fetches.

import { request } from "./api.js";

let viewer = null;
let shown = { file: null, mask: null };
let drawing = Promise.resolve();

// One drawing at a time: NiiVue's list of volumes must not change meanwhile.
export function draw(...what) {
  drawing = drawing.catch(() => {}).then(() => drawNow(...what));
  return drawing;
}

async function load(path, name) {
  const response = await request(path);
  await viewer.loadFromArrayBuffer(await response.arrayBuffer(), name);
}

async function drawNow(canvas, file, [low, high], mask, opacity) {
  if (!viewer) {
    const { Niivue } = await import("./vendor/niivue.js");
    viewer = new Niivue({
      backColor: [0, 0, 0, 1],
      isRadiologicalConvention: true,
      dragAndDropEnabled: false,
      logLevel: "error",
    });
    await viewer.attachToCanvas(canvas);
    viewer.setMultiplanarLayout(2);
    viewer.setSliceType(viewer.sliceTypeMultiplanar);
  }
  if (file !== shown.file || (shown.mask && mask?.id !== shown.mask)) {
    shown = { file: null, mask: null };
    for (const volume of [...viewer.volumes].reverse()) viewer.removeVolume(volume);
    await load(`/v1/files/${file}/volume`, "volume.nii");
    shown.file = file;
  }
  if (mask && mask.id !== shown.mask) {
    await load(`/v1/masks/${mask.id}`, "mask.nii.gz");
    const part = (at) => [0, ...mask.labels.map(({ colour }) => parseInt(colour.slice(at, at + 2), 16))];
    viewer.volumes[1].setColormapLabel({
      R: part(1),
      G: part(3),
      B: part(5),
      A: [0, ...mask.labels.map(() => 255)],
      I: [0, ...mask.labels.map((label) => label.id)],
      labels: ["", ...mask.labels.map((label) => label.name)],
    });
    shown.mask = mask.id;
  }
  [viewer.volumes[0].cal_min, viewer.volumes[0].cal_max] = [low, high];
  if (mask) viewer.volumes[1].opacity = opacity;
  viewer.updateGLVolume();
  canvas.dataset.shown = mask ? "volume mask" : "volume";
}
