// The photos that were chosen: thumbnails, and what the server would refuse, said before anything is sent.

import { byId, el, many, megapixels, size } from "./dom.js";

const MAGIC = [
  [0, [0xff, 0xd8, 0xff]],
  [0, [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a]],
  [8, [0x57, 0x45, 0x42, 0x50]],
];

/** What a file is, by its first bytes; its name and its declared type may say anything. */
async function readable(file) {
  try {
    const head = new Uint8Array(await file.slice(0, 12).arrayBuffer());
    return MAGIC.some(([at, bytes]) => bytes.every((byte, n) => head[at + n] === byte));
  } catch {
    return false; // it was moved or is a folder
  }
}

function measured(url) {
  return new Promise((resolve) => {
    const image = new Image();
    image.onload = () => resolve([image.naturalWidth, image.naturalHeight]);
    image.onerror = () => resolve([0, 0]); // the server may still read it
    image.src = url;
  });
}

export class Photos {
  /** `changed` is called after every change. */
  constructor(changed) {
    this.all = [];
    this.limits = {};
    this.changed = changed;
  }

  async add(files) {
    const fresh = [...files].map((file) => {
      const photo = { file, name: this.free(file.name || "photo.png"), url: URL.createObjectURL(file) };
      this.all.push(photo);
      return photo;
    });
    this.show();
    await Promise.all(
      fresh.map(async (photo) => {
        photo.readable = await readable(photo.file);
        if (photo.readable) [photo.width, photo.height] = await measured(photo.url);
      }),
    );
    this.show();
  }

  /** A name that no other photo has: they are files side by side in a copied command. */
  free(name) {
    const taken = new Set(this.all.map((photo) => photo.name));
    const dot = name.lastIndexOf(".") > 0 ? name.lastIndexOf(".") : name.length;
    let free = name;
    for (let n = 2; taken.has(free); n += 1) free = `${name.slice(0, dot)}-${n}${name.slice(dot)}`;
    return free;
  }

  remove(photo) {
    URL.revokeObjectURL(photo.url);
    this.all = this.all.filter((other) => other !== photo);
    this.show();
  }

  removeAll(photos) {
    for (const photo of photos) this.remove(photo);
  }

  /** Why the server would refuse this one, or null. */
  problem({ file, readable: fine, width, height }) {
    const { max_image_bytes: bytes, max_image_pixels: pixels, max_aspect_ratio: ratio } = this.limits;
    if (file.size === 0) return "it is empty";
    if (fine === false) return "it is no JPEG, PNG or WEBP";
    if (file.size > bytes) return `${size(file.size)}, the server takes ${size(bytes)}`;
    if (width * height > pixels) return `${megapixels(width * height)}, the server takes ${megapixels(pixels)}`;
    if (Math.max(width, height) > ratio * Math.min(width, height)) return `longer than ${ratio} times its width`;
    return null;
  }

  unfit() {
    return this.all.filter((photo) => this.problem(photo) !== null);
  }

  /** Why the server would refuse all of them together, or null. */
  together() {
    const { max_images: count, max_body_bytes: bytes, max_request_pixels: pixels } = this.limits;
    const sum = (number) => this.all.reduce((total, photo) => total + (number(photo) || 0), 0);
    if (this.all.length > count) {
      return `${this.all.length} photos, the server takes ${count} at a time. Remove ${this.all.length - count}.`;
    }
    const sent = sum((photo) => photo.file.size);
    if (sent > 0.98 * bytes) return `${size(sent)} of photos, the server takes ${size(bytes)} at a time. Remove some.`;
    const shown = sum((photo) => photo.width * photo.height);
    if (shown > pixels) return `${megapixels(shown)}, the server takes ${megapixels(pixels)} at a time. Remove some.`;
    return null;
  }

  show() {
    const list = byId("thumbs");
    list.replaceChildren(...this.all.map((photo, n) => this.thumb(photo, n)));
    list.hidden = byId("clear").hidden = this.all.length === 0;
    const bytes = this.all.reduce((total, photo) => total + photo.file.size, 0);
    const count = this.all.length ? `${many(this.all.length, "photo")}, ${size(bytes)}` : "";
    byId("photo-count").textContent = this.together() ?? count;
    byId("photo-count").classList.toggle("wrong", this.together() !== null);
    this.changed();
  }

  thumb(photo, n) {
    const wrong = this.problem(photo);
    const remove = el("button", { type: "button", class: "remove", title: `Remove ${photo.name}` }, "\u00d7");
    remove.setAttribute("aria-label", `Remove ${photo.name}`);
    remove.addEventListener("click", () => {
      this.remove(photo);
      const rest = byId("thumbs").querySelectorAll(".remove");
      (rest[Math.min(n, rest.length - 1)] ?? byId("files")).focus();
    });
    return el(
      "li",
      { class: wrong ? "unfit" : "" },
      el("img", { src: photo.url, alt: photo.name, title: photo.name }),
      remove,
      wrong && el("span", { class: "reason" }, wrong),
    );
  }

  /** The server's limits, in words. */
  limited(limits) {
    this.limits = limits;
    const { max_images: count, max_image_bytes: bytes, max_image_pixels: pixels } = limits;
    byId("photo-limits").textContent =
      `JPEG, PNG or WEBP \u00b7 up to ${count} \u00b7 ${size(bytes)} and ${megapixels(pixels)} each`;
    this.show();
  }
}
