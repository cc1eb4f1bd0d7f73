// The frame of the page: signing in, the views and the way between them, and the state of the connection.

import { Api } from "./api.js";
import { append, el, empty, fill, icon, setText, toast } from "./dom.js";
import { Live } from "./live.js";
import { Loads } from "./loads.js";

/*
 * The views. Each is a module with `mount(root, page)`, which shows the view in the element `root` and returns a
 * function that is called when the view is left. `page` has
 *   api      requests to the node, with the key;
 *   live     the state of the cluster; null for keys that may not see it;
 *   loads    how busy the workers were since the page was opened; null as above;
 *   session  name, role, mode, version, node_id;
 *   args     what follows the view's name in the address: #requests/req_1 has ["req_1"];
 *   go(view, ...args)  goes to another view;
 *   signal   is aborted when the user signs out: what a view leaves running ends then;
 *   signInAgain(key, message)  forgets this key, and goes on with another one, or asks for it if `key` is empty.
 */
const VIEWS = [
  { id: "requests", title: "Requests", roles: ["operator", "admin"] },
  { id: "workers", title: "Workers", roles: ["operator", "admin"] },
  { id: "models", title: "Models", roles: ["inference", "operator", "admin"] },
  { id: "playground", title: "Playground", roles: ["inference", "operator", "admin"] },
  { id: "keys", title: "Keys and usage", roles: ["inference", "operator", "admin"] },
  { id: "connect", title: "Connect a client", roles: ["inference", "operator", "admin"] },
];

const THEMES = ["auto", "light", "dark"];
const app = document.getElementById("app");
let chosenTheme = storedTheme();
// Counts what the user has asked for: an answer of the node to what was asked for before shows nothing.
let entering = 0;

applyTheme();
if (document.documentElement.dataset.requiresKey === "true") showSignIn();
else enter(new Api());

/** Ask the node who the user is, and show the page; ask for a key if it wants one. */
async function enter(api, form = null) {
  const number = ++entering;
  let session;
  try {
    session = await api.json("ui/session");
  } catch (error) {
    if (number !== entering) return;
    if (form === null) showSignIn(error.status === 401 ? "" : error.message);
    else form(error);
    return;
  }
  if (number === entering) showPage(api, session);
}

function showSignIn(message = "", cancel = null) {
  entering++;
  document.title = "Sign in – trio_cluster";
  const field = el("input", {
    type: "password", id: "api-key", autocomplete: "off", spellcheck: false, required: true, "aria-describedby": "sign-in-error",
  });
  const error = el("p.error", { id: "sign-in-error", role: "alert" }, message);
  const button = el("button.primary", { type: "submit" }, "Sign in");
  const form = el(
    "form.sign-in",
    {
      onsubmit: async (event) => {
        event.preventDefault();
        setText(error, "");
        button.disabled = true;
        await enter(new Api(field.value.trim()), (failure) => {
          setText(error, failure.status === 401 ? "This key is not valid." : failure.message);
          button.disabled = false;
          field.select();
        });
      },
    },
    el("h1", {}, logo(), "trio_cluster"),
    el("label", { for: "api-key" }, "API key"),
    field,
    error,
    button,
    cancel && el("button", { type: "button", onclick: cancel }, "Back"),
    el("p.hint", {},
      "The key stays in this tab's memory, and is forgotten when the page is closed or loaded again. A key for operators shows requests and workers; every other key has the playground and its own usage."),
  );
  fill(app, el("main.center", {}, form));
  field.focus();
}

function showPage(api, session) {
  const views = VIEWS.filter((view) => view.roles.includes(session.role));
  const live = session.role === "inference" ? null : new Live(api);
  const loads = live && new Loads(live);
  const links = views.map((view) =>
    el("a", { href: `#${view.id}`, "data-view": view.id }, icon(view.id), el("span", {}, view.title)),
  );
  const connection = el("p.connection", { role: "status" });
  const main = el("main", { id: "main", tabIndex: -1 });
  const heading = el("h1");
  const root = el("div.view");
  const themes = el("button", { type: "button", onclick: nextTheme }, icon("theme"), el("span", {}, themeLabel()));
  const who = session.name ? `${session.name} · ${session.role}` : session.role === "inference" ? "no key" : `${session.role}, without a key`;
  const signing = el(
    "button",
    { type: "button", onclick: () => leave(api.hasKey) },
    icon("out"),
    el("span", {}, api.hasKey ? "Sign out" : "Sign in"),
  );
  append(main, [connection, heading, root]);
  fill(
    app,
    el("a.skip", { href: "#main", onclick: (event) => (event.preventDefault(), main.focus()) }, "Skip to the content"),
    el(
      "div.frame",
      {},
      el(
        "div.side",
        {},
        el("a.brand", { href: `#${views[0].id}` }, logo(), el("span", {}, "trio_cluster")),
        el("nav", { "aria-label": "Views" }, links),
        el("div.foot", {}, el("p.who", { title: `Node ${session.node_id}` }, who), themes, signing,
          el("p.version", {}, `${session.mode} · ${session.version}`)),
      ),
      main,
    ),
  );

  const leaving = new AbortController();
  let unmount = () => {};
  let shown = 0;
  let timer = 0;
  let failed = false;

  async function show() {
    const number = ++shown;
    failed = false;
    const [id, ...args] = location.hash.slice(1).split("/").map(decode);
    const view = views.find((each) => each.id === id) ?? views[0];
    unmount();
    unmount = () => {};
    for (const link of links) {
      if (link.dataset.view === view.id) {
        link.setAttribute("aria-current", "page");
        // On narrow screens the views are a strip that scrolls.
        link.parentNode.scrollLeft = link.offsetLeft - link.parentNode.offsetLeft - 40;
      } else link.removeAttribute("aria-current");
    }
    document.title = `${view.title} – trio_cluster`;
    setText(heading, view.title);
    fill(root);
    root.className = `view ${view.id}`;
    let module;
    try {
      module = await import(`./views/${view.id}.js`);
    } catch {
      if (number !== shown) return;
      failed = true;
      fill(root, empty(
        "This view cannot be loaded",
        el("p", {}, "The node cannot be reached, or runs another version by now. The view is loaded when the connection is back."),
        el("button", { type: "button", onclick: show }, "Try again"),
      ));
      return;
    }
    if (number === shown) unmount = module.mount(root, pageFor(args)) ?? (() => {});
  }

  function pageFor(args) {
    return { api, live, loads, session, args, go, signal: leaving.signal, signInAgain };
  }

  function go(...parts) {
    const hash = `#${parts.map(encodeURIComponent).join("/")}`;
    if (location.hash === hash) show();
    else location.hash = hash;
  }

  function showConnection() {
    clearTimeout(timer);
    const lost = live.state === "lost";
    connection.classList.toggle("lost", lost);
    if (!lost) {
      setText(connection, "");
      if (failed && live.state === "live") show();
      return;
    }
    if (live.error?.status === 403) {
      // The role of the key was changed: what it may still see is another page.
      stop();
      enter(api);
      return;
    }
    const left = Math.max(1, Math.ceil((live.retryAt - Date.now()) / 1000));
    setText(connection, `Connection lost: what is shown may be old. Trying again in ${left} s.`);
    timer = setTimeout(showConnection, 1000);
  }

  function stop() {
    api.onrefused = () => {};
    // A view that is still being loaded is not shown.
    shown++;
    window.removeEventListener("hashchange", show);
    clearTimeout(timer);
    live?.stop();
    loads?.stop();
    // What they would do takes the key that is forgotten now.
    for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close();
    unmount();
    leaving.abort();
  }

  /** Forget the key, and ask for another one. */
  function leave(signedIn, message = "") {
    stop();
    showSignIn(message, signedIn ? null : () => enter(api));
  }

  function signInAgain(key, message = "") {
    stop();
    if (key) enter(new Api(key));
    else showSignIn(message);
  }

  function nextTheme() {
    const next = THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length];
    chosenTheme = next;
    try {
      localStorage.setItem("theme", next);
    } catch {
      // A browser that keeps nothing forgets it with the page.
    }
    applyTheme();
    setText(themes.querySelector("span"), themeLabel());
  }

  window.addEventListener("hashchange", show);
  api.onrefused = () => leave(true, api.hasKey ? "The key is no longer valid." : "Requests need a key from now on.");
  if (live !== null) {
    live.addEventListener("state", showConnection);
    live.start();
  }
  show();
  // The other views are loaded ahead, so that they can be shown while the node is away. If that fails, they are loaded
  // when they are shown.
  for (const view of views) import(`./views/${view.id}.js`).catch(() => {});
}

/** Return a part of the address as text; as it is, if it is not encoded as it should be. */
function decode(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

function logo() {
  return el("img", { src: "icon.svg", alt: "", width: 24, height: 24 });
}

function storedTheme() {
  try {
    return localStorage.getItem("theme");
  } catch {
    // Browsers that are set to keep nothing throw.
    return null;
  }
}

function theme() {
  return THEMES.includes(chosenTheme) ? chosenTheme : "auto";
}

function themeLabel() {
  return { auto: "Theme: system", light: "Theme: light", dark: "Theme: dark" }[theme()];
}

function applyTheme() {
  document.documentElement.dataset.theme = theme();
}

window.addEventListener("unhandledrejection", (event) => {
  if (event.reason?.name !== "AbortError") toast(event.reason?.message ?? String(event.reason), "error");
});
