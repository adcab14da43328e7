// Starts the page: the model, uploads, and errors.

import { ApiError, forget, json, upload, useKey } from "./api.js";
import { Dialogue } from "./dialogue.js";
import { $, element } from "./dom.js";
import { Images } from "./images.js";
import { Viewer } from "./viewer.js";

const FILM = ["CR", "DX", "RG", "PX"];
const SEQUENCES = ["t1c", "t1", "t2", "flair"];
let viewer = null;
let images = null;
let dialogue = null;
let questions = {};
let starting = null; // an upload waits for it

function problem(message, status = 0) {
  $("problem").textContent = message;
  $("problem").hidden = !message;
  if (status === 401) {
    $("key-form").hidden = false;
    $("key").focus();
  }
}

async function start() {
  let model;
  try {
    [model] = (await json("/v1/models")).data;
  } catch (error) {
    if (error.status === 401) {
      $("key-form").hidden = false;
      $("key").focus();
      if ($("key").value) problem("The server does not know this key.");
    } else {
      problem(error.message);
    }
    return;
  }
  problem("");
  $("key-form").hidden = true;
  $("key").value = "";
  if (dialogue) return;
  const { vilam3 } = model;
  questions = vilam3.questions;
  $("model").textContent = `Model: ${model.id}`;
  const experts = $("experts");
  experts.checked = vilam3.experts.length > 0;
  experts.disabled = !experts.checked;
  experts.parentElement.append(
    experts.checked ? element("span", { class: "soft" }, `(${vilam3.experts.join(", ")})`) : " (this server has none)",
  );
  $("max-tokens").max = vilam3.max_length;
  viewer = new Viewer({ onChange: changed, onError: problem, use3d: vilam3.niivue });
  const roles = vilam3.cards.flatMap((card) => card.roles).filter(Boolean);
  images = new Images({ viewer, roles: roles.length ? [...new Set(roles)] : SEQUENCES, onChange: changed, onError: problem });
  dialogue = new Dialogue({ viewer, images, model: model.id, onError: problem });
  $("samples").hidden = !vilam3.samples.length;
  for (const sample of vilam3.samples) {
    const choose = () => show(sample.name, () => json(`/v1/samples/${sample.id}`, { method: "POST" }));
    $("samples").append(element("button", { type: "button", onclick: choose }, sample.name));
  }
  changed();
}

function changed() {
  images?.refresh();
  dialogue?.refresh();
  const code = viewer.info?.modality;
  const kind = !viewer.info ? "" : code in questions ? code : FILM.includes(code) ? "CR" : "other";
  if ($("examples").dataset.kind === kind) return;
  $("examples").dataset.kind = kind;
  const choose = (text) => () => {
    $("question").value = text;
    $("question").focus();
  };
  $("examples").replaceChildren(
    ...questions[kind].map((text) => element("button", { type: "button", onclick: choose(text) }, text)),
  );
}

// Uploads a file and shows it; `added`: beside the sequences that are there.
function open(file, added = false) {
  const percent = (part) => (part < 1 ? `Uploading: ${Math.round(part * 100)} %` : "Reading…");
  const sending = () => upload(file, (part) => ($("upload").textContent = percent(part)));
  return show(file.name, sending, added);
}

// Shows what `store` stores on the server.
async function show(name, store, added = false) {
  await starting;
  if (!viewer) {
    if (!$("key-form").hidden) problem("Enter the API key first.");
    return;
  }
  if ($("image").ariaBusy === "true") return;
  problem("");
  $("image").ariaBusy = "true";
  const before = $("upload").textContent;
  $("upload").textContent = "Reading…";
  try {
    const stored = await store();
    try {
      await (added ? images.add(stored.id, name) : images.open(stored.id, name));
    } catch (error) {
      forget(stored.id);
      throw error;
    }
    $("upload").textContent = `${name}: ${stored.vilam3.kind}`;
    dialogue.restart(added ? "Another sequence, a new dialogue." : "A new image, a new dialogue.");
  } catch (error) {
    $("upload").textContent = added ? before : "";
    problem(error.message, error instanceof ApiError ? error.status : 0);
  } finally {
    $("image").ariaBusy = "false";
  }
}

function listen() {
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    useKey($("key").value);
    starting = start();
  });
  for (const id of ["file", "more"]) {
    $(id).addEventListener("change", () => {
      const [file] = $(id).files;
      if (file) open(file, id === "more");
      $(id).value = "";
    });
  }
  let inside = 0; // the events of children bubble
  document.addEventListener("dragenter", () => document.body.classList.toggle("dropping", ++inside > 0));
  document.addEventListener("dragleave", () => document.body.classList.toggle("dropping", --inside > 0));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    inside = 0;
    document.body.classList.remove("dropping");
    const [file, ...others] = event.dataTransfer.files;
    if (others.length) problem("Drop one file. Several files of a DICOM series: put them into a zip.");
    else if (file) open(file);
  });
  window.addEventListener("pagehide", (event) => {
    if (!images || event.persisted) return;
    images.clear();
    dialogue.close();
  });
}

listen();
starting = start();
