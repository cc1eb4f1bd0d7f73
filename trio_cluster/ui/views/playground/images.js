// Pictures: made from a prompt, or from other pictures.

import { el } from "../../dom.js";
import { choice, facts, field, requestForm, send } from "./parts.js";

const SIZES = ["auto", "64x64", "256x256", "512x512", "1024x1024", "1536x1024", "1024x1536"];
const TYPES = { png: "image/png", webp: "image/webp", jpeg: "image/jpeg", gif: "image/gif", svg: "image/svg+xml" };

/** Return the task; `edits`: pictures are given, and changed. */
export function createImages(page, edits = false) {
  let model = null;
  let urls = [];
  const prompt = el("textarea", { rows: 3, required: true, maxLength: 32000 });
  const images = el("input", { type: "file", accept: "image/*", multiple: true, required: edits });
  const mask = el("input", { type: "file", accept: "image/*" });
  const sizes = el("datalist", { id: `sizes-${edits}` }, SIZES.map((value) => el("option", { value })));
  const size = el("input", {
    value: "auto", list: sizes.id, pattern: "auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4}", title: "auto, or WIDTHxHEIGHT", required: true, spellcheck: false,
  });
  const count = el("input", { type: "number", min: 1, max: 10, value: 1, required: true });
  const quality = choice(["auto", "low", "medium", "high"]);

  const { element, stop, form } = requestForm(page, {
    controls: [
      edits && el("div.fields", {}, field("Pictures", images), field("Mask", mask, "Where it is transparent, the first picture is changed")),
      field("Prompt", prompt),
      el("div.fields", {}, field("Size", size, "auto, or WIDTHxHEIGHT"), sizes, field("How many", count), field("Quality", quality)),
    ],
    action: edits ? "Change" : "Make",
    onclear: () => {
      urls.forEach((url) => URL.revokeObjectURL(url));
      urls = [];
    },
    run: async (signal) => {
      const fields = { model: model.id, prompt: prompt.value, size: size.value, n: count.valueAsNumber };
      if (quality.value !== "auto") fields.quality = quality.value;
      let body = fields;
      if (edits) {
        body = new FormData();
        for (const [name, value] of Object.entries(fields)) body.append(name, value);
        for (const file of images.files) body.append("image", file);
        if (mask.files.length) body.append("mask", mask.files[0]);
      }
      const began = performance.now();
      const { response, ...sent } = await send(page, `v1/images/${edits ? "edits" : "generations"}`, { body, signal });
      const answer = await response.json();
      const took = (performance.now() - began) / 1000;
      const shown = answer.data.map((each, index) => {
        const file = new Blob([Uint8Array.from(atob(each.b64_json), (letter) => letter.charCodeAt(0))], {
          type: TYPES[answer.output_format] ?? typeOf(each.b64_json),
        });
        const url = URL.createObjectURL(file);
        urls.push(url);
        return el("figure", {}, el("img", { src: url, alt: prompt.value }),
          el("figcaption", {},
            el("a", { href: url, download: `picture-${index + 1}.${file.type.split("/")[1].split("+")[0]}` }, answer.data.length > 1 ? `Save picture ${index + 1}` : "Save the picture"),
            each.revised_prompt && el("p.hint", {}, `Prompt used: ${each.revised_prompt}`)));
      });
      return [el("div.gallery", {}, shown), facts(page, { ...sent, took })];
    },
  });

  return { element, stop, focus: () => form.querySelector("input, textarea").focus({ preventScroll: true }), choose: (chosen) => (model = chosen) };
}

/** Return the type of a file by its first bytes, in base64. */
function typeOf(text) {
  const beginnings = { iVBORw: "image/png", "/9j/": "image/jpeg", UklGR: "image/webp", R0lGOD: "image/gif", PHN2Zy: "image/svg+xml" };
  return Object.entries(beginnings).find(([beginning]) => text.startsWith(beginning))?.[1] ?? "image/png";
}
