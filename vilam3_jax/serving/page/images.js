// The images that questions are about: one, or several sequences of one head.

import { forget } from "./api.js";
import { $, element } from "./dom.js";

// What the names of files usually say.
const GUESSES = { t1c: /t1-?_?(c|gd|post|km)/i, flair: /flair/i, t2: /t2/i, t1: /t1/i };

export class Images {
  constructor({ viewer, roles, onChange, onError }) {
    this.viewer = viewer;
    this.roles = roles;
    this.onChange = onChange;
    this.onError = onError;
    this.items = []; // { file, name, role }
  }

  // The ids of the files, of which the viewer shows one.
  get files() {
    return this.items.map((item) => item.file);
  }

  get name() {
    const { length } = this.items;
    return length > 1 ? `${this.viewer.name} of ${length} sequences` : this.viewer.name;
  }

  // What the model is shown, as parts of a message.
  get parts() {
    const { options } = this.viewer;
    const many = this.items.length > 1;
    return this.items.map(({ file, role }) => ({
      type: "image_url",
      image_url: { url: file },
      vilam3: many ? { ...options, role } : options,
    }));
  }

  // Shows another image instead of those before.
  async open(file, name) {
    await this.viewer.open(file);
    this.clear();
    this.items = [{ file, name, role: this.guess(name) }];
    this.draw();
  }

  // Adds a sequence on the grid of the first one.
  async add(file, name) {
    if (this.items.length >= this.roles.length) {
      throw new Error(`There are at most ${this.roles.length} sequences; remove one first.`);
    }
    await this.viewer.turnTo(file);
    this.items.push({ file, name, role: this.guess(name) });
    this.draw();
  }

  clear() {
    for (const { file } of this.items) forget(file);
    this.items = [];
  }

  async remove(item) {
    const others = this.items.filter((one) => one !== item);
    if (this.viewer.file === item.file && !(await this.show(others[0]))) return;
    this.items = others;
    forget(item.file);
    this.draw();
  }

  async show(item) {
    try {
      await this.viewer.turnTo(item.file);
    } catch (error) {
      this.onError(error.message);
      return false;
    }
    this.draw();
    return true;
  }

  // A role that no other sequence has, the one that the name suggests if it is free.
  guess(name) {
    const taken = this.items.map((item) => item.role);
    const free = this.roles.filter((role) => !taken.includes(role));
    const wanted = Object.keys(GUESSES).find((role) => GUESSES[role].test(name));
    return free.includes(wanted) ? wanted : free[0];
  }

  // Two sequences never have the same role: the other one takes the old role.
  rename(item, role) {
    const other = this.items.find((one) => one !== item && one.role === role);
    if (other) other.role = item.role;
    item.role = role;
    this.draw();
  }

  // Sequences are of MR; the user may state the modality.
  refresh() {
    $("sequences").hidden = !this.viewer.isVolume || (this.viewer.info.modality === "CT" && this.items.length < 2);
  }

  draw() {
    const many = this.items.length > 1;
    $("sequence-list").hidden = !many;
    $("sequence-list").replaceChildren(...(many ? this.items.map((item) => this.row(item)) : []));
    this.onChange();
  }

  row(item) {
    const isShown = item.file === this.viewer.file;
    const choose = element("select", { "aria-label": `Sequence of ${item.name}` });
    choose.append(...this.roles.map((role) => element("option", { value: role, selected: role === item.role }, role)));
    choose.addEventListener("change", () => this.rename(item, choose.value));
    const show = element(
      "button",
      { type: "button", "aria-pressed": String(isShown), onclick: () => this.show(item) },
      item.name,
    );
    const remove = element("button", { type: "button", "aria-label": `Remove ${item.name}` }, "Remove");
    remove.addEventListener("click", () => this.remove(item));
    return element("li", {}, choose, show, remove);
  }
}
