// Starts the page: the model, uploads, and errors.

import { ApiError, forget, json, upload, useKey } from "./api.js";
import { Dialogue } from "./dialogue.js";
import { $, element } from "./dom.js";
import { Viewer } from "./viewer.js";

const FILM = ["CR", "DX", "RG", "PX"];
let viewer = null;
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
  dialogue = new Dialogue({ viewer, model: model.id, onError: problem });
  changed();
}

function changed() {
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

async function open(file) {
  await starting;
  if (!viewer) {
    $("file").value = "";
    if (!$("key-form").hidden) problem("Enter the API key first.");
    return;
  }
  problem("");
  $("file").disabled = true;
  const before = viewer.file;
  const percent = (part) => (part < 1 ? `Uploading: ${Math.round(part * 100)} %` : "Reading…");
  try {
    $("upload").textContent = percent(0);
    const stored = await upload(file, (part) => ($("upload").textContent = percent(part)));
    try {
      await viewer.open(stored.id);
    } catch (error) {
      forget(stored.id);
      throw error;
    }
    if (before) forget(before);
    $("upload").textContent = `${file.name}: ${stored.vilam3.kind}`;
    dialogue.restart("A new image, a new dialogue.");
  } catch (error) {
    $("upload").textContent = "";
    problem(error.message, error instanceof ApiError ? error.status : 0);
    if (!(error instanceof ApiError)) console.error(error);
  } finally {
    $("file").disabled = false;
    $("file").value = "";
  }
}

function listen() {
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    useKey($("key").value);
    starting = start();
  });
  $("file").addEventListener("change", () => $("file").files[0] && open($("file").files[0]));
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
    if (viewer?.file && !event.persisted) forget(viewer.file);
  });
}

listen();
starting = start();
