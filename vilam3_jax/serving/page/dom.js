// Small helpers for elements.

export const $ = (id) => document.getElementById(id);

// element("p", { class: "soft" }, "text", child)
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

export function save(blob, name) {
  const url = URL.createObjectURL(blob);
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

export const millilitres = (value) => {
  if (value === null || value === undefined) return "volume unknown";
  return `${value >= 100 ? Math.round(value) : value.toFixed(1)} ml`;
};
