// What the server's words mean to a person: statuses, reasons, errors, notes. Unknown ones are shown as they are.

import { many } from "./dom.js";

export const METHODS = {
  gram: "All photos are tuned on together, with what was learned beforehand.",
  infomax: "All photos are tuned on together, with nothing learned beforehand.",
  tpt: "Each photo is tuned on by itself, with many views of it.",
  none: "Zero-shot: the model answers as it is.",
};

/** Scopes that a method has; "auto" is whichever it would choose. */
export const SCOPES = {
  gram: ["auto", "image", "batch"],
  infomax: ["auto", "batch"],
  tpt: ["auto", "image"],
  none: ["auto"],
};

const STATUS = { completed: "tuned", partial: "tuned in part", skipped: "skipped", fallback: "tuning discarded" };

const REASONS = {
  none_requested: "zero-shot was asked for",
  budget: "the tuning time you allowed was over",
  deadline: "the request's time limit came first",
  brownout: "the server is busy and did less",
  single_class: "with one class there is nothing to choose",
  too_few_images: "too few photos to tune on together",
  not_finite: "the numbers got out of hand",
  diverged: "it only became less sure",
  kl_cap: "it moved too far from the first answer",
  out_of_memory: "the device ran out of memory",
  internal: "something went wrong inside",
  not_accepted: "tuned, but not convincing for this photo",
};

const ZERO_SHOT = "answered zero-shot";

/** One sentence about what tuning did with one photo. */
export function told(adaptation, batchFrom) {
  const { status, reason, accepted, method } = adaptation;
  if (reason === "none_requested") return `${ZERO_SHOT}, as asked`;
  let because = REASONS[reason] ?? reason;
  if (reason === "too_few_images" && batchFrom) because = `fewer than ${batchFrom} photos to tune on together`;
  if (reason === "not_accepted") return `${because}: ${ZERO_SHOT}`;
  const head = STATUS[status] ?? status;
  if (status === "skipped" || status === "fallback") return `${head}: ${because} \u2013 ${ZERO_SHOT}`;
  const scope = adaptation.scope === "batch" ? "all photos together" : "this photo alone";
  const work = `${method} on ${scope}, ${many(adaptation.steps, "step")}, ${many(adaptation.views, "view")}`;
  const asked = `asked were ${many(adaptation.steps_requested, "step")} and ${many(adaptation.views_requested, "view")}`;
  const less = because ? `; ${because} (${asked})` : "";
  return `${head}: ${work}${less}${accepted ? "" : ` \u2013 ${ZERO_SHOT}`}`;
}

const NOTES = {
  exif_ignored: "its orientation could not be read",
  alpha_composited: "transparent parts were put on white",
};

export function noted(note) {
  const frames = /^first_frame_of_(\d+)$/.exec(note);
  return frames ? `the first of its ${frames[1]} frames` : (NOTES[note] ?? note);
}

/** What an error means and what to do, by its code, or else by its status. */
const ERRORS = {
  unauthenticated: ["This server wants a key", "Type a valid API key into the form and try again."],
  origin_not_allowed: ["This page may not ask this server", "Open the page at the server's own address."],
  host_not_allowed: ["The server goes by another name", "Open it at an address of GRAM_ALLOWED_HOSTS."],
  body_too_large: ["That is too much at once", "Send fewer or smaller photos."],
  image_too_large: ["A photo is too large", "Make it smaller, or leave it out."],
  too_many_images: ["That are too many photos", "Send fewer of them at a time."],
  too_many_pixels: ["Together the photos are too large", "Send fewer or smaller ones."],
  request_too_costly: ["That is more work than one request may be", "Ask for fewer views, steps, photos or classes."],
  class_text_too_long: ["A class name is too long for the model", "Shorten the name or the template."],
  duplicate_class: ["Two classes have the same name", "Keep one of them."],
  too_many_classes: ["That are too many classes", "Leave some out."],
  bad_template: ["The template does not fit", "It needs {} exactly once, and no other braces."],
  method_unavailable: ["This model can't do that", "Choose another method or another way to tune."],
  invalid_request: ["The server did not accept this", "Change what it names and try again."],
  unsupported_image_format: ["A file is no photo that the server reads", "Send JPEG, PNG or WEBP."],
  undecodable_image: ["A photo is damaged", "Leave it out, or save it again."],
  overloaded: ["The server is busy", "Wait a moment and try again."],
  rate_limited: ["This key has asked a lot lately", "Wait a moment and try again."],
  not_ready: ["The model is still being loaded", "Try again in a few seconds."],
  draining: ["The server is stopping", "Try again once it is back."],
  accelerator_failed: ["The device failed", "The server is being replaced; try again soon."],
  deadline_exceeded: ["It took too long", "Send fewer photos, or ask for fewer views or steps."],
  unreachable: ["The server can't be reached", "See whether it still runs, then try again."],
  unreadable: ["The answer can't be read", "Something between here and the server changed it."],
};

export function kindly(code, status) {
  if (ERRORS[code]) return ERRORS[code];
  if (status >= 500) return ["Something went wrong on the server", "Try again; if it stays, its log has the details."];
  return ["The server did not accept this", "Change what it names and try again."];
}

/** Numbers of an explanation, in the order they are shown. */
export const FACTS = [
  ["shift", "distance to the nearest prototype"],
  ["trust", "trust in the tree of prototypes"],
  ["structure_share", "part of the step that came from the tree"],
  ["skew", "how unevenly the classes occur"],
  ["rho", "weight of rehearsal"],
  ["prompt_shift", "how far the prompt moved"],
];

export const STAGES = [
  ["body", "receiving"],
  ["decode", "decoding"],
  ["queue", "waiting"],
  ["text", "class names"],
  ["image", "looking"],
  ["adapt", "tuning"],
];
