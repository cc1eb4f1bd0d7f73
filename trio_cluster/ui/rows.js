// A tree grid of which only the rows that can be seen are in the document, so that ten thousand cost what forty do.

import { append, el } from "./dom.js";

// Rows above and below those that can be seen, so that scrolling shows no gap.
const SPARE = 8;

/**
 * Shows a list of items in a tree grid (`role="treegrid"`). All rows have the same height, that of `--row` in the style.
 *
 * The items are objects with
 *   key       a text that stays the same while the item is shown: its row keeps the focus;
 *   kind      what makes the row: rows are used again for items of the same kind;
 *   level     its level in the tree, from 1 on;
 *   expanded  whether what is below it is shown; undefined: there is nothing below it.
 * One row is active: Tab goes to it, and the arrow keys change which one it is. It is in the document wherever the list
 * is scrolled to.
 */
export class RowList {
  #items = [];
  #indices = new Map();
  #rows = new Map();
  #free = {};
  #active = null;
  #activeIndex = 0;
  #head;
  #body;
  #make;
  #open;
  #toggle;
  #frame = 0;
  #resized;

  /**
   * @param {object} options
   *   label   what the list is, for screen readers;
   *   columns the headers: `{ title, class, hidden }`; `hidden`: only screen readers have it;
   *   make    makes a row of a kind: returns `{ element, update(item) }`;
   *   open    called with the item when its row is clicked, or Enter is pressed;
   *   toggle  called with the item when what is below it is to be shown or hidden.
   */
  constructor({ label, columns, make, open, toggle }) {
    this.#make = make;
    this.#open = open;
    this.#toggle = toggle;
    this.#body = el("div.rows", { role: "rowgroup" });
    this.#head = el(
      "div.head",
      { role: "rowgroup" },
      el(
        "div.line",
        { role: "row", "aria-rowindex": 1 },
        columns.map((column) =>
          el("div", { role: "columnheader", class: column.class ?? "" }, column.hidden ? el("span.hidden-label", {}, column.title) : column.title),
        ),
      ),
    );
    this.element = el("div.list", {
      role: "treegrid", "aria-label": label, "aria-rowcount": 1, "aria-colcount": columns.length,
      onkeydown: (event) => this.#key(event), onclick: (event) => this.#click(event), onfocusin: (event) => this.#focused(event),
    }, this.#head, this.#body);
    this.element.addEventListener("scroll", () => this.#soon(), { passive: true });
    this.#resized = new ResizeObserver(() => this.#soon());
    this.#resized.observe(this.element);
  }

  /** Where the list is scrolled to and which row is active, to be given to {@link restore} of another list. */
  get place() {
    return { top: this.element.scrollTop, active: this.#active };
  }

  /** Go to a place, with the focus if `focus` is true. The items must have been shown. */
  restore({ top, active }, focus) {
    this.#active = active;
    this.#activeIndex = this.#indices.get(active) ?? 0;
    this.element.scrollTop = top;
    this.render();
    if (focus) this.#row(this.#activeIndex)?.element.focus({ preventScroll: true });
  }

  /** Show items. What is shown of them is read anew. */
  show(items) {
    this.#items = items;
    this.#indices = new Map(items.map((item, index) => [item.key, index]));
    this.element.setAttribute("aria-rowcount", items.length + 1);
    this.render();
  }

  close() {
    this.#resized.disconnect();
    cancelAnimationFrame(this.#frame);
  }

  #soon() {
    this.#frame ||= requestAnimationFrame(() => this.render());
  }

  /** Write what is seen now. */
  render() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    const count = this.#items.length;
    const height = this.#height();
    this.#body.style.height = `${count * height}px`;
    const held = this.#rows.get(this.#active)?.element;
    const focus = held?.contains(document.activeElement) ? document.activeElement : null;
    if (this.#indices.has(this.#active)) this.#activeIndex = this.#indices.get(this.#active);
    else this.#activeIndex = Math.max(0, Math.min(this.#activeIndex, count - 1));
    // The row of an item that is gone leaves the focus to the one that takes its place.
    const active = this.#items[this.#activeIndex]?.key ?? null;
    const moved = active !== this.#active && focus !== null;
    this.#active = active;

    const top = this.element.scrollTop - this.#head.offsetHeight;
    const first = Math.max(0, Math.floor(top / height) - SPARE);
    const last = Math.min(count - 1, Math.ceil((top + this.element.clientHeight) / height) + SPARE);
    const wanted = [];
    for (let index = first; index <= last; index++) wanted.push(index);
    if (count > 0 && this.#activeIndex < first) wanted.unshift(this.#activeIndex);
    if (count > 0 && this.#activeIndex > last) wanted.push(this.#activeIndex);

    const kept = new Set(wanted.map((index) => this.#items[index].key));
    for (const [key, row] of this.#rows) {
      if (kept.has(key) && this.#items[this.#indices.get(key)].kind === row.kind) continue;
      this.#rows.delete(key);
      row.element.remove();
      (this.#free[row.kind] ??= []).push(row);
    }
    for (const index of wanted) this.#write(index, height);
    this.#order(wanted);
    if (moved) this.#row(this.#activeIndex)?.element.focus({ preventScroll: true });
  }

  #write(index, height) {
    const item = this.#items[index];
    let row = this.#rows.get(item.key);
    if (row === undefined) {
      row = this.#free[item.kind]?.pop() ?? { kind: item.kind, at: -1, ...this.#make(item.kind) };
      row.element.setAttribute("role", "row");
      row.element.dataset.key = item.key;
      this.#rows.set(item.key, row);
    }
    const { element } = row;
    const at = index * height;
    if (row.at !== at) {
      row.at = at;
      element.style.transform = `translateY(${at}px)`;
      element.setAttribute("aria-rowindex", index + 2);
    }
    setAttribute(element, "aria-level", item.level);
    setAttribute(element, "aria-expanded", item.expanded);
    element.tabIndex = index === this.#activeIndex ? 0 : -1;
    row.update(item, element.tabIndex);
  }

  // The rows are in the document in their order, for those who read it there. The row with the focus is not moved, since
  // that would take the focus away.
  #order(wanted) {
    const rows = wanted.map((index) => this.#rows.get(this.#items[index].key).element);
    const fixed = Math.max(0, rows.findIndex((row) => row.contains(document.activeElement)));
    if (rows.length === 0) return;
    if (rows[fixed].parentNode !== this.#body) this.#body.append(rows[fixed]);
    for (let i = fixed - 1; i >= 0; i--) if (rows[i].nextSibling !== rows[i + 1]) rows[i + 1].before(rows[i]);
    for (let i = fixed + 1; i < rows.length; i++) if (rows[i].previousSibling !== rows[i - 1]) rows[i - 1].after(rows[i]);
  }

  #row(index) {
    return this.#rows.get(this.#items[index]?.key);
  }

  #height() {
    return parseFloat(getComputedStyle(this.element).getPropertyValue("--row")) || 36;
  }

  /** The item of the row in which something has happened; undefined: it was in none. */
  #itemOf(event) {
    const row = event.target.closest("[data-key]");
    return row === null ? undefined : this.#items[this.#indices.get(row.dataset.key)];
  }

  #focused(event) {
    const item = this.#itemOf(event);
    if (item !== undefined && item.key !== this.#active) this.#activate(this.#indices.get(item.key), false);
  }

  #click(event) {
    const item = this.#itemOf(event);
    if (item === undefined || event.target.closest("button, a")) return;
    this.#activate(this.#indices.get(item.key));
    this.#open(item);
  }

  #activate(index, focus = true) {
    this.#active = this.#items[index].key;
    this.#activeIndex = index;
    if (focus) this.#reveal(index);
    this.render();
    if (focus) this.#row(index).element.focus({ preventScroll: true });
  }

  #reveal(index) {
    const height = this.#height();
    const top = index * height;
    const room = this.element.clientHeight - this.#head.offsetHeight;
    if (top < this.element.scrollTop) this.element.scrollTop = top;
    else if (top + height > this.element.scrollTop + room) this.element.scrollTop = top + height - room;
  }

  #key(event) {
    const item = this.#itemOf(event);
    if (item === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    const index = this.#indices.get(item.key);
    const page = Math.max(1, Math.floor(this.element.clientHeight / this.#height()) - 2);
    const last = this.#items.length - 1;
    let next;
    switch (event.key) {
      case "ArrowDown": next = index + 1; break;
      case "ArrowUp": next = index - 1; break;
      case "PageDown": next = index + page; break;
      case "PageUp": next = index - page; break;
      case "Home": next = 0; break;
      case "End": next = last; break;
      case "ArrowRight":
        if (item.expanded === false) this.#toggle(item);
        else if (item.expanded) next = index + 1;
        break;
      case "ArrowLeft":
        if (item.expanded) this.#toggle(item);
        else if (item.level > 1) for (next = index; next > 0 && this.#items[next].level >= item.level; ) next--;
        break;
      case "Enter":
        // On a button it presses that.
        if (event.target.closest("button") !== null) return;
        this.#open(item);
        break;
      default: return;
    }
    event.preventDefault();
    if (next !== undefined) this.#activate(Math.max(0, Math.min(last, next)));
  }
}

/** Return a cell of a row, and of a screen reader's table. */
export function cell(tag, ...children) {
  return append(el(tag, { role: "gridcell" }), children);
}

function setAttribute(element, name, value) {
  if (value === undefined) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}
