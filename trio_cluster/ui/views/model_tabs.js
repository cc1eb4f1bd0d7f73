// What the views that ask for the models of a key have in common: the list of models, and tabs above the view.

import { el, fill } from "../dom.js";
import { failure } from "./playground/parts.js";

/**
 * List the models that the key of a page may use, and show them in a view.
 *
 * @param {HTMLElement} root the element of the view.
 * @param {object} page of the view; see `app.js`.
 * @param {AbortSignal} gone aborted when the view has been left; nothing is shown then.
 * @param {function(object[], function(): HTMLElement)} show shows the models; its second argument makes such a button.
 */
export async function showModels(root, page, gone, show) {
  const again = () => el("button", { type: "button", onclick: () => showModels(root, page, gone, show) }, "Look again");
  fill(root, el("p.quiet", { role: "status" }, "Loading the models"));
  let models;
  try {
    models = (await page.api.json("v1/models")).data;
  } catch (error) {
    if (!gone.aborted) fill(root, failure(page, error, "The models cannot be listed"), again());
    return;
  }
  if (!gone.aborted) show(models, again);
}

/**
 * Return links that look like tabs: `{element, scroll}`. On narrow screens they are a strip, which `scroll()` moves to
 * the current one once it is shown.
 */
export function tabStrip(label, view, entries, current) {
  const element = el(
    "nav.tabs",
    { "aria-label": label },
    entries.map((each) => el("a", { href: `#${view}/${each.id}`, "aria-current": each === current ? "page" : null }, each.title)),
  );
  return {
    element,
    scroll() {
      element.scrollLeft = element.querySelector("[aria-current]").offsetLeft - element.offsetLeft - 40;
    },
  };
}
