// Connect a client: what to paste, with the address and the models of this server. Keys are not shown: the page has
// the user's own, and this text is for files.

import { el, empty, fill, setText, snippet } from "../dom.js";
import { CLIENTS } from "./connect/clients.js";
import { showModels, tabStrip } from "./model_tabs.js";
import { field } from "./playground/parts.js";

const LOCAL = /^(localhost|127\.|\[::1\])/;

/** `#connect/CLIENT` */
export function mount(root, page) {
  const gone = new AbortController();

  function show(models, again) {
    const client = CLIENTS.find((each) => each.id === page.args[0]) ?? CLIENTS[0];
    const fitting = models.filter((model) => client.kinds.includes(model.kind));
    const tabs = tabStrip("Clients", "connect", CLIENTS, client);
    const address = el("input", { type: "url", value: chosen.get(page.api)?.base ?? page.api.base, spellcheck: false, autocomplete: "off" });
    const model = el("select", {}, fitting.map((each) => el("option", { value: each.id }, each.id)));
    const wanted = chosen.get(page.api)?.model;
    if (fitting.some((each) => each.id === wanted)) model.value = wanted;
    const note = el("p.hint");
    const steps = el("div.recipe");

    function update() {
      const base = address.value.trim().replace(/\/+$/, "").replace(/\/v1$/, "");
      chosen.set(page.api, { base, model: model.value || wanted });
      const host = base.replace(/^https?:\/\//, "");
      setText(note, LOCAL.test(host) ? "This address is reached from this machine only. For a client elsewhere, put in the name or address that this machine has there." : "");
      const entry = fitting.find((each) => each.id === model.value);
      const at = { base, needsKey: page.session.requires_key };
      fill(
        steps,
        client.steps(at, entry).filter(Boolean).map(({ text, file, code }) => [
          text && el("p", {}, text),
          file && el("p.file", {}, code && "In ", el("code", {}, file), ":"),
          code && snippet(code, `Copy ${file ?? "this"}`),
        ]),
      );
    }

    address.addEventListener("input", update);
    model.addEventListener("change", update);
    fill(
      root,
      tabs.element,
      fitting.length
        ? [
          el("div.fields.choices", {}, field("Address of this server", address), field("Model", model)),
          note,
          el("p.hint", {}, keyNote(page)),
          page.api.base.startsWith("https:") &&
            el("p.hint", {}, "If this server's certificate comes from an authority of your own, clients have to know its ca.pem: ",
              el("code", {}, "curl --cacert ca.pem"), ", ", el("code", {}, "SSL_CERT_FILE=ca.pem"), " for Python, ",
              el("code", {}, "NODE_EXTRA_CA_CERTS=ca.pem"), " for Node."),
          steps,
        ]
        : empty(
          "No model fits",
          el("p", {}, models.length ? `${client.title} needs a chat model, and none is served.` : "The node serves no model, or your key allows none."),
          again(),
        ),
    );
    tabs.scroll();
    if (fitting.length) update();
  }

  showModels(root, page, gone.signal, show);
  return () => gone.abort();
}

// The address and the model stay chosen from client to client.
const chosen = new WeakMap();

function keyNote(page) {
  if (!page.session.requires_key) return "This server needs no key; clients that want one take any text, such as YOUR_KEY.";
  if (page.session.role !== "admin") return "Put your key in the place of YOUR_KEY.";
  return ["Put a key in the place of YOUR_KEY, ", el("a", { href: "#keys" }, "a new one"), " for each client or person."];
}
