// Small tools of the page. Text reaches it as text only: there is no way here to put markup in.

/** An element with properties and children; a string becomes a text node, null and false are left out. */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") made.className = value;
    else if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== false));
  return made;
}

/** The same for SVG, where everything is an attribute. */
export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export const byId = (id) => document.getElementById(id);

export const many = (count, one, more = `${one}s`) => `${count} ${count === 1 ? one : more}`;

const SPACE = "\u00a0"; // between a number and its unit

/** A score in [0, 1] as a percentage that never claims 0 or 100 where it is neither. */
export function percent(score) {
  const hundred = score * 100;
  if (score > 0 && hundred < 0.05) return `<0.1${SPACE}%`;
  if (score < 1 && hundred >= 99.95) return `>99.9${SPACE}%`;
  return `${hundred.toFixed(1)}${SPACE}%`;
}

export function milliseconds(ms) {
  if (ms >= 1000) return `${(ms / 1000).toFixed(ms >= 10_000 ? 1 : 2)}${SPACE}s`;
  return `${ms.toFixed(ms >= 10 ? 0 : 1)}${SPACE}ms`;
}

export function size(bytes) {
  if (bytes >= 1 << 20) return `${(bytes / (1 << 20)).toFixed(1).replace(".0", "")}${SPACE}MiB`;
  return bytes >= 1024 ? `${Math.round(bytes / 1024)}${SPACE}KiB` : `${bytes}${SPACE}bytes`;
}

export const megapixels = (pixels) => `${Math.round(pixels / 1e5) / 10}${SPACE}megapixels`;
