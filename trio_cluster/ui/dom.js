// Making and changing elements. Text is always set as text: nothing here makes HTML out of a string.

/**
 * Return a new element.
 *
 * @param {string} tag its name, with classes: "div.card.wide".
 * @param {object} props `on*` are listeners; `class`, `data-*`, `aria-*`, `role` and `for` are attributes; `false`,
 *     `null` and `undefined` leave an attribute out; all others are properties of the element.
 * @param {...(Node|string|number|null|false|Array)} children
 */
export function el(tag, props = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(props)) {
    if (value === false || value === null || value === undefined) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "class") element.classList.add(...value.split(" ").filter(Boolean));
    else if (/^(data-|aria-|role$|for$|list$|colspan$)/.test(key)) element.setAttribute(key, value === true ? "true" : value);
    else element[key] = value;
  }
  append(element, children);
  return element;
}

/** Append children to an element: nodes, texts, and lists of these; null and false are left out. */
export function append(element, children) {
  for (const child of [children].flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) element.append(child);
  }
  return element;
}

/** Replace everything in an element. */
export function fill(element, ...children) {
  element.replaceChildren();
  return append(element, children);
}

/** Set the text of an element if it differs: an unchanged text keeps the selection and costs no layout. */
export function setText(element, text) {
  text = String(text);
  if (element.textContent !== text) element.textContent = text;
}

const SVG = "http://www.w3.org/2000/svg";

/** Return a new element of SVG; all props are attributes. */
export function svg(tag, props = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(props)) element.setAttribute(key, value);
  return append(element, children);
}

// Strokes on a grid of 24 by 24, drawn for this page.
const ICONS = {
  requests: "M4 6h16M4 12h11M4 18h7",
  workers: "M4 5h16v5H4zM4 14h16v5H4zM8 7.5h.01M8 16.5h.01",
  models: "M12 3l8 4.5v9L12 21l-8-4.5v-9zM4 7.5l8 4.5 8-4.5M12 12v9",
  playground: "M4 5h16v11H9l-5 4z",
  keys: "M14.5 9.5a5 5 0 1 1-2-4M13 11l7 7M17 15l2-2",
  connect: "M9 7H6a5 5 0 0 0 0 10h3M15 7h3a5 5 0 0 1 0 10h-3M8 12h8",
  close: "M6 6l12 12M18 6L6 18",
  theme: "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 0 1 0 16",
  out: "M14 4h5v16h-5M4 12h10M10 8l4 4-4 4",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  microphone: "M12 3a3 3 0 0 0-3 3v5a3 3 0 0 0 6 0V6a3 3 0 0 0-3-3zM6 11a6 6 0 0 0 12 0M12 17v4",
  picture: "M4 5h16v14H4zM4 16l5-5 4 4 3-3 4 4M15.5 8.5h.01",
  retry: "M20 11a8 8 0 1 0-2 6M20 4v7h-7",
};

/** Return an icon that screen readers skip: what it means is in the text, or in the label, beside it. */
export function icon(name) {
  return svg(
    "svg",
    { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true", focusable: "false" },
    svg("path", { d: ICONS[name] }),
  );
}

/** Show a message for a few seconds; errors stay until they are closed. */
export function toast(message, kind = "info") {
  const close = el("button.icon-button", { type: "button", "aria-label": "Close", onclick: () => box.remove() }, icon("close"));
  const box = el(`div.toast.${kind}`, kind === "error" ? { role: "alert" } : {}, el("span", {}, message), close);
  document.getElementById("toasts").append(box);
  if (kind !== "error") setTimeout(() => box.remove(), 5000);
}

/**
 * Open a modal dialog, and return it. Escape closes it; the focus goes back to where it was.
 *
 * @param {string} title
 * @param {Node[]} content
 * @param {object} options `wide`: for texts and tables; `stays`: only its buttons close it; `onclose` is called when it
 *     has been closed.
 */
export function openDialog(title, content, { wide = false, stays = false, onclose = () => {} } = {}) {
  const dialog = el("dialog", { "aria-label": title, class: wide ? "wide" : "" });
  const close = el("button.icon-button", { type: "button", "aria-label": "Close", onclick: () => dialog.close() }, icon("close"));
  append(dialog, [el("header", {}, el("h2", {}, title), close), el("div.content", {}, content)]);
  dialog.addEventListener("close", () => {
    dialog.remove();
    onclose();
  });
  // A click outside closes it, unless it has begun inside: a text that is selected with the mouse may end there.
  let outside = false;
  dialog.addEventListener("pointerdown", (event) => (outside = event.target === dialog));
  dialog.addEventListener("click", (event) => {
    if (outside && event.target === dialog && !stays) dialog.close();
  });
  dialog.addEventListener("cancel", (event) => {
    if (stays) event.preventDefault();
  });
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/**
 * Ask before something is done that cannot be undone.
 *
 * @param {string} title what is asked, such as "Drain gpu-1?"
 * @param {string} text what it does.
 * @param {string} action the word on the button that does it.
 * @returns {Promise<boolean>}
 */
export function ask(title, text, action) {
  return new Promise((resolve) => {
    let agreed = false;
    const dialog = openDialog(
      title,
      [
        el("p", {}, text),
        el(
          "div.actions",
          {},
          el("button", { type: "button", onclick: () => dialog.close() }, "Keep"),
          el("button.danger", { type: "button", onclick: () => ((agreed = true), dialog.close()) }, action),
        ),
      ],
      { onclose: () => resolve(agreed) },
    );
  });
}

/**
 * Return a button that copies a text.
 *
 * @param {function(): string} text
 * @param {string} label what it copies, for screen readers.
 * @param {function} otherwise what is done where pages may not copy, which is without HTTPS.
 */
export function copyButton(text, label, otherwise = () => toast("The browser lets pages copy over HTTPS only: select the text, and copy it with the keyboard")) {
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text());
      toast("Copied");
    } catch {
      otherwise();
    }
  };
  return el("button.icon-button", { type: "button", "aria-label": label, title: label, onclick: copy }, icon("copy"));
}

/** Return a text to copy, with a button that copies it. */
export function snippet(text, label = "Copy") {
  const code = el("code", {}, text);
  const select = () => {
    getSelection().selectAllChildren(code);
    toast("Selected: copy it with the keyboard");
  };
  return el("div.snippet", {}, el("pre", { tabIndex: 0 }, code), copyButton(() => text, label, select));
}

/**
 * Return a list of facts, each a name and a value: `{element, set(name, value)}`. They stand in the order in which they
 * were first set; an empty value is not shown.
 */
export function factList(classes = "facts") {
  const element = el(`dl.${classes}`);
  const values = new Map();
  return {
    element,
    set(name, value) {
      let shown = values.get(name);
      if (shown === undefined) {
        shown = { text: el("dd"), element: el("div") };
        shown.element.append(el("dt", {}, name), shown.text);
        values.set(name, shown);
        element.append(shown.element);
      }
      setText(shown.text, value);
      shown.element.hidden = value === "";
    },
  };
}

/** Return what a view shows while it has nothing: what that means, and what to do next. */
export function empty(title, ...children) {
  return el("div.empty", {}, el("h2", {}, title), ...children);
}
