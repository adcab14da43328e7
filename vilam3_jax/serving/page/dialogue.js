// The dialogue: questions, streamed answers, and what the experts do.

import { ApiError, chat, forgetDialogue } from "./api.js";
import { $, element, millilitres, save } from "./dom.js";
import { legend } from "./viewer.js";

const callName = (name, args) => (args ? `${name}(${args})` : name);
const callText = (call) => callName(call.function.name, JSON.parse(call.function.arguments).args);
const NUMBERS = ["temperature", "top-p", "seed", "max-tokens"];

export class Dialogue {
  constructor({ viewer, images, model, onError }) {
    this.viewer = viewer;
    this.images = images;
    this.model = model;
    this.onError = onError;
    this.previous = null; // id of the last answer, with which the server keeps the dialogue
    this.results = new Map(); // finished calls of the dialogue by their text
    this.lines = []; // of the transcript
    this.sent = null; // what the model was shown last
    this.listen();
    this.refresh();
  }

  listen() {
    $("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.ask();
    });
    $("question").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.ask();
    });
    $("cancel").addEventListener("click", () => this.running?.abort());
    $("again").addEventListener("click", () => {
      this.restart();
      $("question").focus();
    });
    $("save").addEventListener("click", () => this.save());
    $("scenes").addEventListener("change", () => $("log").classList.toggle("scenes", $("scenes").checked));
  }

  // Begins again, for example about another image; `line` says so.
  restart(line = "A new dialogue begins.") {
    this.running?.abort();
    if ($("log").children.length) {
      $("log").append(element("p", { class: "divider soft small" }, line));
      this.lines.push("", `--- ${line}`, "");
    }
    this.close();
    this.results.clear();
    this.sent = this.offered = null;
    this.refresh();
  }

  // The server forgets the dialogue.
  close() {
    if (this.previous) forgetDialogue(this.previous);
    this.previous = null;
  }

  // The line about what the model is shown, after the viewer changed.
  refresh() {
    const { images } = this;
    const first = images.files[0];
    const isSent = this.sent !== null && this.sent.files[0] === first;
    $("about").hidden = !first;
    if (!first) return;
    const now = JSON.stringify(images.parts);
    $("attach-text").textContent = !isSent
      ? `Show ${images.name} to the model`
      : now === this.sent.parts
        ? `Show ${images.name} again (the model has seen it)`
        : `Show ${images.name} to the model (so far: ${this.sent.name})`;
    if (!isSent && this.offered !== first) {
      $("attach").checked = true;
      this.offered = first;
    }
  }

  async ask() {
    const question = $("question").value.trim();
    if (this.running) return;
    if (!question) {
      $("question").focus();
      return;
    }
    for (const id of NUMBERS) {
      if ($(id).checkValidity()) continue;
      $(id).closest("details").open = true;
      $(id).reportValidity();
      return;
    }
    this.onError("");
    const { images, viewer, previous } = this;
    const { files, name, parts } = images;
    const shown = files.length && $("attach").checked ? { files, name, parts: JSON.stringify(parts) } : null;
    const content = shown ? [...parts, { type: "text", text: question }] : question;
    const running = (this.running = new AbortController());
    const about = (shown ?? this.sent)?.files ?? [];
    const exchange = new Exchange(question, shown?.name, viewer, about, this.results);
    $("log").append(exchange.element);
    $("log").setAttribute("aria-busy", "true");
    exchange.element.scrollIntoView({ block: "nearest" });
    this.busy(true);
    $("question").value = "";
    const body = {
      model: this.model,
      messages: [{ role: "user", content }],
      store: true,
      vilam3: { experts: $("experts").checked, images: true, masks: true, transcript: true },
    };
    if (previous) body.vilam3.previous = previous;
    for (const id of NUMBERS) if ($(id).value) body[id.replace("-", "_")] = Number($(id).value);
    try {
      for await (const event of chat(body, running.signal)) {
        exchange.event(event);
        $("log").scrollTop = $("log").scrollHeight;
      }
      if (this.running !== running) {
        forgetDialogue(exchange.id); // a new dialogue began meanwhile
        return;
      }
      this.close();
      this.previous = exchange.id;
      if (shown) {
        this.sent = shown;
        $("attach").checked = false;
      }
    } catch (error) {
      const cancelled = error.name === "AbortError";
      exchange.fail(cancelled ? "Cancelled." : error.message);
      if (!$("question").value) $("question").value = question;
      if (error instanceof ApiError && error.status === 401) this.onError(error.message, 401);
      else if (!(error instanceof ApiError) && !cancelled) console.error(error);
    } finally {
      this.running = this.running === running ? null : this.running;
      this.lines.push(...exchange.lines(), "");
      $("log").setAttribute("aria-busy", "false");
      this.busy(false);
      this.refresh();
      $("log").scrollTop = $("log").scrollHeight;
    }
  }

  busy(on) {
    $("send").disabled = on;
    $("cancel").hidden = !on;
    $("save").disabled = on || !this.lines.length;
    if (!on && document.activeElement === document.body) $("question").focus();
  }

  save() {
    const head = ["vilam3, research use only. Not for clinical use.", `Model: ${this.model}`, ""];
    save(new Blob([[...head, ...this.lines].join("\n")], { type: "text/plain" }), "vilam3-transcript.txt");
  }
}

// One question and its answer on the page.
class Exchange {
  // `files` are what the question is about, `results` the finished calls of the dialogue.
  constructor(question, shown, viewer, files, results) {
    this.id = null;
    this.question = question;
    this.shown = shown;
    this.viewer = viewer;
    this.files = files;
    this.results = results;
    this.known = []; // names of calls of earlier turns
    this.text = this.draft = "";
    this.failure = "";
    this.steps = new Map(); // expert calls by id
    this.turns = [];
    this.notes = [];
    this.stepList = element("ol", { class: "steps" });
    this.answer = element("p", { class: "answer waiting" }, "The model reads…");
    this.after = element("div");
    const about = shown ? [element("span", { class: "soft small" }, `about ${shown}`)] : [];
    this.element = element(
      "article",
      { class: "exchange" },
      element("p", { class: "asked" }, element("span", { class: "unseen" }, "Question: "), question, ...about),
      this.stepList,
      this.answer,
      this.after,
    );
  }

  event(event) {
    this.id = event.id;
    const delta = event.choices?.[0]?.delta ?? {};
    if (delta.draft) this.write("draft", delta.draft);
    if (delta.content) this.write("text", delta.content);
    for (const call of delta.experts ?? []) this.step(call);
    if (event.vilam3) this.finish(event.vilam3);
  }

  write(kind, text) {
    this[kind] += text;
    this.answer.className = kind === "draft" ? "answer draft" : "answer";
    this.answer.textContent = this[kind];
  }

  step(call) {
    const name = callText(call);
    let step = this.steps.get(call.id);
    if (!step) {
      step = { element: element("li"), name };
      this.steps.set(call.id, step);
      this.stepList.append(step.element);
    }
    step.call = call;
    if (call.status === "running") {
      this.draft = "";
      this.answer.className = "answer waiting";
      this.answer.textContent = "The model waits for the expert…";
      step.element.className = "running";
      step.element.textContent = `${name} is running…`;
      return;
    }
    this.answer.textContent = "The model reads the result…";
    step.element.className = call.status === "ok" ? "done" : "failed";
    if (call.status !== "ok") {
      step.element.textContent = `${name} gave no result: ${call.reason}`;
      return;
    }
    this.results.set(name, call);
    step.element.replaceChildren(`${name} is done`, ...this.result(name, call));
    if (call.result.mask) this.showMask(call.result.mask, name);
  }

  showMask(mask, name) {
    return this.viewer.showMask(mask, name, this.files);
  }

  // The legend of a result, and a button that shows its mask.
  result(name, call) {
    const { probabilities, segments, mask } = call.result;
    const items = Object.entries(probabilities).map(([label, value]) => {
      const meter = element("meter", { min: 0, max: 1, value: value ?? 0, "aria-label": `probability of ${label}` });
      const percent = value === null ? "unknown" : `${Math.round(value * 100)} %`;
      return element("li", {}, `${label}: ${percent} `, meter);
    });
    if (mask) items.push(...legend(mask));
    else for (const one of segments) items.push(element("li", {}, `${one.name}, ${millilitres(one.volume_ml)}`));
    const list = element("ul", { class: "legend" }, ...items);
    if (!mask) return [list];
    return [list, element("button", { type: "button", onclick: () => this.showMask(mask, name) }, "Show this mask")];
  }

  finish({ notes, transcript, overlay, image, known }) {
    this.answer.className = "answer";
    for (const { name, args } of known) this.remember(callName(name, args));
    if (!this.text) this.answer.textContent = "(The model wrote nothing.)";
    this.notes = notes;
    this.turns = transcript ?? [];
    if (overlay) {
      const caption = element("figcaption", { class: "soft small" }, "The expert's overlay, as the model sees it.");
      const saving = element("a", { href: overlay, download: "expert-overlay.png" }, "Download");
      caption.append(" ", saving);
      const picture = element("img", { src: overlay, alt: "The slice with the expert's labels in colour" });
      this.after.append(element("figure", {}, picture, caption));
    }
    if (notes.length) {
      const list = element("ul", {}, ...notes.map((note) => element("li", {}, note)));
      this.after.append(element("details", { class: "notes small" }, element("summary", {}, "Notes"), list));
    }
    this.after.append(this.scenes(image));
  }

  // A result of an earlier turn, which the model knows.
  remember(name) {
    this.known.push(name);
    const call = this.results.get(name);
    const found = call?.result ? this.result(name, call) : [];
    this.stepList.append(element("li", { class: "known" }, `Known from before: ${name}`, ...found));
  }

  // What the user does not see otherwise.
  scenes(image) {
    const box = element("div", { class: "behind small" }, element("h3", {}, "Behind the scenes"));
    if (image) {
      const caption = element("figcaption", { class: "soft" }, "The image as the model sees it.");
      box.append(element("figure", {}, element("img", { src: image, alt: "The image as the model sees it" }), caption));
    }
    const titles = { cards: "Cards of the experts", user: "User", assistant: "Model", expert: "Expert", system: "System" };
    this.turns.forEach((turn, place) => {
      const isTrigger = turn.role === "assistant" && this.turns[place + 1]?.role === "expert";
      const title = isTrigger ? "Model, the trigger" : titles[turn.role];
      const text = element("pre", { tabindex: "0", role: "group", "aria-label": title }, turn.text);
      if (turn.role === "cards") {
        box.append(element("details", {}, element("summary", {}, title), text));
      } else {
        box.append(element("h4", {}, title), text);
      }
    });
    return box;
  }

  fail(message) {
    this.failure = message;
    for (const { element: one, name, call } of this.steps.values()) {
      if (call.status === "running") one.textContent = `${name} was not finished`;
      one.classList.remove("running");
    }
    if (!this.text) this.answer.remove();
    this.after.append(element("p", { class: "problem", role: "alert" }, message));
  }

  lines() {
    const lines = [`Question${this.shown ? ` about ${this.shown}` : ""}: ${this.question}`];
    for (const { name, call } of this.steps.values()) {
      const found = call.result
        ? [
            ...Object.entries(call.result.probabilities).map(([label, value]) => `${label} ${value}`),
            ...(call.result.mask?.labels ?? call.result.segments).map(
              (one) => `${one.name} ${millilitres(one.volume_ml)}`,
            ),
          ].join(", ") || "nothing found"
        : (call.reason ?? "no result");
      lines.push(`Expert ${name}: ${found}`);
    }
    lines.push(...this.known.map((name) => `Known from before: ${name}`));
    if (this.text) lines.push(`Answer: ${this.text}`);
    if (this.failure) lines.push(`Not complete: ${this.failure}`);
    lines.push(...this.notes.map((note) => `Note: ${note}`));
    if ($("scenes").checked) {
      lines.push(...this.turns.flatMap((turn) => [`[${turn.role}]`, turn.text]));
    }
    return lines;
  }
}
