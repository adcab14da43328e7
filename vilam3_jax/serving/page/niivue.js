// The 3-D view: the volume and the mask in NiiVue, a file that `make page` fetches.

import { request } from "./api.js";

let viewer = null;
let shown = "";

export async function draw(canvas, file, mask) {
  const { Niivue } = await import("./vendor/niivue.js");
  if (!viewer) {
    viewer = new Niivue({ backColor: [0, 0, 0, 1], isRadiologicalConvention: true, dragAndDropEnabled: false, logLevel: "error" });
    await viewer.attachToCanvas(canvas);
  }
  const wanted = `${file} ${mask?.id ?? ""}`;
  if (wanted === shown) return;
  shown = "";
  for (const volume of [...viewer.volumes]) viewer.removeVolume(volume);
  const volume = await request(`/v1/files/${file}/volume`);
  await viewer.loadFromArrayBuffer(await volume.arrayBuffer(), "volume.nii");
  if (mask) {
    const labels = await request(`/v1/masks/${mask.id}`);
    await viewer.loadFromArrayBuffer(await labels.arrayBuffer(), "mask.nii.gz");
    const colours = mask.labels.map((label) => [1, 3, 5].map((place) => parseInt(label.colour.slice(place, place + 2), 16)));
    const channel = (number) => [0, ...colours.map((colour) => colour[number])];
    viewer.volumes[1].setColormapLabel({
      R: channel(0),
      G: channel(1),
      B: channel(2),
      A: [0, ...colours.map(() => 140)],
      I: [0, ...mask.labels.map((label) => label.id)],
      labels: ["", ...mask.labels.map((label) => label.name)],
    });
    viewer.updateGLVolume();
  }
  viewer.setMultiplanarLayout(2);
  viewer.setSliceType(viewer.sliceTypeMultiplanar);
  shown = wanted;
  canvas.dataset.shown = mask ? "volume mask" : "volume";
}
