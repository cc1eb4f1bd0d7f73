// A text that arrives in pieces. Paragraphs and fenced code become elements; all else is shown as it was written.

import { copyButton, el } from "../../dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
// The beginning of a line that may still become a fence. It is held back until that is decided.
const PERHAPS_FENCE = /^ {0,3}(`{0,2}|~{0,2}|(`{3,}|~{3,})[^`]*)$/;

/**
 * Attributes: `element`; `text`, all that was appended.
 *
 * Each piece costs its own length: what was shown before is not touched again. A paragraph is a block of its own, so
 * that the browser lays out only the last one anew.
 */
export class Prose {
  #node = null;
  #fence = "";
  #held = "";
  #begun = false;
  #newline = false;

  constructor() {
    this.element = el("div.prose");
    this.text = "";
  }

  append(piece) {
    this.text += piece;
    let rest = this.#held + piece;
    this.#held = "";
    for (;;) {
      const end = rest.indexOf("\n");
      if (end < 0) break;
      this.#line(rest.slice(0, end));
      rest = rest.slice(end + 1);
    }
    if (!this.#begun && PERHAPS_FENCE.test(rest)) this.#held = rest;
    else this.#write(rest);
  }

  /** Show what was held back. Nothing may be appended after that. */
  end() {
    if (this.#held && !(this.#fence && this.#closes(this.#held))) this.#write(this.#held);
    this.#held = "";
  }

  #line(line) {
    const begun = this.#begun;
    this.#begun = false;
    const fence = !begun && FENCE.exec(line);
    if (this.#fence) {
      if (!begun && this.#closes(line)) {
        this.#fence = "";
        this.#node = null;
        return;
      }
    } else if (fence) {
      this.#open(fence[1], fence[2].trim());
      return;
    } else if (!begun && line.trim() === "") {
      this.#node = null;
      return;
    }
    this.#write(line, true);
    this.#begun = false;
    this.#newline = true;
  }

  #closes(line) {
    const fence = FENCE.exec(line);
    return fence !== null && fence[2].trim() === "" && fence[1].startsWith(this.#fence);
  }

  #open(fence, language) {
    this.#fence = fence;
    this.#node = document.createTextNode("");
    this.#newline = false;
    const node = this.#node;
    this.element.append(
      el(
        "div.snippet",
        {},
        language && el("span.language", {}, language),
        el("pre", { tabIndex: 0 }, el("code", {}, node)),
        copyButton(() => node.data, "Copy the code"),
      ),
    );
  }

  #write(text, whole = false) {
    if (text === "" && !whole) return;
    if (this.#node === null) {
      this.#node = document.createTextNode("");
      this.#newline = false;
      this.element.append(el("p", {}, this.#node));
    }
    this.#node.appendData(this.#newline ? `\n${text}` : text);
    this.#newline = false;
    this.#begun = true;
  }
}
