// Talking to a chat model, with pictures, tools and settings.

import { copyButton, el, fill, icon, setText, toast } from "../../dom.js";
import { Answer } from "./answer.js";
import { createSettings, SettingError } from "./settings.js";

const NEAR_THE_END = 120;

/** What the user has said. Attributes: `element`, `text`, `pictures` (data URLs). */
class Question {
  constructor(text, pictures, actions) {
    this.text = text;
    this.pictures = pictures;
    this.actions = actions;
    this.element = el("article.turn.question", { "aria-label": "Your message" });
    this.show();
  }

  show() {
    fill(
      this.element,
      this.pictures.length > 0 && el("div.pictures", {}, this.pictures.map((url) => el("img", { src: url, alt: "Picture that you sent" }))),
      el("p.said", {}, this.text),
      el(
        "div.tools",
        {},
        copyButton(() => this.text, "Copy your message"),
        el(
          "button.icon-button",
          { type: "button", "aria-label": "Edit your message", title: "Edit your message", onclick: () => this.edit() },
          icon("edit"),
        ),
      ),
    );
  }

  edit() {
    const input = el("textarea", { value: this.text, rows: Math.min(12, this.text.split("\n").length + 1), "aria-label": "Your message" });
    const back = () => {
      this.show();
      this.element.querySelector("[aria-label='Edit your message']").focus();
    };
    const save = () => this.actions.edited(this, input.value);
    input.addEventListener("keydown", (event) => {
      if (sends(event)) {
        event.preventDefault();
        save();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        back();
      }
    });
    fill(
      this.element,
      input,
      el("div.row.end", {}, el("span.hint.grow", {}, "What follows is asked again."),
        el("button.small", { type: "button", onclick: back }, "Cancel"),
        el("button.small.primary", { type: "button", onclick: save }, "Send")),
    );
    input.focus();
  }

  change(text) {
    this.text = text;
    this.show();
  }

  messages() {
    if (!this.pictures.length) return [{ role: "user", content: this.text }];
    const parts = this.pictures.map((url) => ({ type: "image_url", image_url: { url } }));
    if (this.text) parts.unshift({ type: "text", text: this.text });
    return [{ role: "user", content: parts }];
  }
}

/** Return the task: `{element, choose(model), stop(), focus()}`. */
export function createChat(page) {
  let model = null;
  let turns = [];
  let running = null;
  let pictures = [];

  const settings = createSettings();
  const log = el("div.turns", { role: "log", "aria-label": "Conversation", "aria-live": "off" });
  const announcer = el("p.hidden-label", { role: "status" });
  const input = el("textarea", { rows: 2, id: "chat-message", placeholder: "Message", "aria-describedby": "chat-keys chat-error" });
  const files = el("input", { type: "file", accept: "image/*", multiple: true, hidden: true });
  const attach = el(
    "button.icon-button",
    { type: "button", "aria-label": "Add pictures", title: "Add pictures", onclick: () => files.click() },
    icon("picture"),
  );
  const shelf = el("div.pictures");
  const button = el("button.primary", { type: "submit" }, "Send");
  const problem = el("p.error", { role: "alert", id: "chat-error" });
  const again = el("button.small", { type: "button", onclick: startAgain }, "New conversation");
  const composer = el(
    "form.composer.card",
    { onsubmit: submit },
    el("label.hidden-label", { for: "chat-message" }, "Message"),
    shelf,
    input,
    problem,
    el("div.row", {}, attach, files, el("span.hint.grow", { id: "chat-keys" }, "Enter sends, Shift+Enter begins a line, Escape stops"), again, button),
  );

  const hint = el("div.empty", {}, el("h2", {}, "Say something"), el("p", {}, "The conversation is kept in this page only, and is gone when the page is closed."));
  const element = el("div.chat", {}, el("div.talk", {}, log, announcer, composer), settings.element);
  log.append(hint);

  input.addEventListener("keydown", (event) => {
    if (!sends(event)) return;
    event.preventDefault();
    if (running === null) composer.requestSubmit();
  });
  input.addEventListener("input", grow);
  composer.addEventListener("paste", (event) => takeFiles(event.clipboardData.files, event));
  // Everywhere, since a browser opens a file that is dropped beside the place for it.
  element.addEventListener("dragover", (event) => event.preventDefault());
  element.addEventListener("drop", (event) => {
    if (event.dataTransfer.files.length) event.preventDefault();
    takeFiles(event.dataTransfer.files);
  });
  files.addEventListener("change", async () => {
    await takeFiles(files.files);
    files.value = "";
  });
  showControls();

  const actions = {
    retry: (answer) => askAgain(turns.indexOf(answer)),
    results: () => submit(),
    edited: (question, text) => askAgain(turns.indexOf(question) + 1, () => question.change(text)),
  };

  function submit(event) {
    event?.preventDefault();
    if (running !== null) {
      stop();
      return;
    }
    const last = turns.at(-1);
    const open = last instanceof Answer && last.waitsForResults;
    const text = input.value.trim();
    if (!open && !text && !pictures.length) return;
    const body = readSettings();
    if (body === null) return;
    if (open) last.takeResults();
    if (text || pictures.length) {
      addTurn(new Question(text, pictures, actions));
      input.value = "";
      pictures = [];
      showPictures();
      grow();
    }
    answerNow(body);
  }

  function readSettings() {
    setText(problem, "");
    try {
      return settings.request();
    } catch (error) {
      if (!(error instanceof SettingError)) throw error;
      setText(problem, error.message);
      settings.showError(error);
      return null;
    }
  }

  /** Have the conversation answered once more, from a turn on. What is there stays if the settings cannot be sent. */
  function askAgain(index, change = () => {}) {
    const body = readSettings();
    if (body === null) return;
    change();
    cutBefore(index);
    answerNow(body);
  }

  async function answerNow(body) {
    stop();
    const system = settings.system();
    const messages = turns.flatMap((turn) => turn.messages());
    if (system) messages.unshift({ role: "system", content: system });
    const answer = new Answer(page, model.id, actions);
    running = answer;
    addTurn(answer);
    showControls();
    setText(announcer, "Sent");
    following = true;
    scrollToEnd();
    await answer.run({ model: model.id, messages, ...body }, () => follow(answer));
    if (running !== answer) return;
    running = null;
    setText(announcer, answer.announcement);
    showControls();
    if (answer.waitsForResults) answer.calls[0].field.focus();
  }

  function addTurn(turn) {
    hint.remove();
    turns.push(turn);
    log.append(turn.element);
    showControls();
  }

  function cutBefore(index) {
    stop();
    for (const turn of turns.splice(index)) turn.element.remove();
    showControls();
  }

  function startAgain() {
    cutBefore(0);
    log.append(hint);
    input.focus();
  }

  /** Stop the answer that is coming. Its request is aborted, which ends the work on the worker. */
  function stop() {
    const answer = running;
    running = null;
    answer?.stop();
    if (answer !== null) setText(announcer, "The answer was stopped");
    showControls();
  }

  function showControls() {
    setText(button, running === null ? "Send" : "Stop");
    button.classList.toggle("danger", running !== null);
    button.classList.toggle("primary", running === null);
    again.hidden = turns.length === 0;
    // A model of kind "any" stands for whatever the server behind it has.
    const sees = model !== null && (model.capabilities?.vision || model.kind === "any");
    attach.hidden = !sees;
  }

  async function takeFiles(list, event = null) {
    const images = [...list].filter((file) => file.type.startsWith("image/"));
    if (!images.length) return;
    event?.preventDefault();
    if (attach.hidden) {
      toast(`${model.id} does not take pictures`);
      return;
    }
    const urls = await Promise.all(images.map(dataUrl));
    // Not before they were read: a message that was sent meanwhile has taken its pictures along.
    pictures.push(...urls);
    showPictures();
  }

  function showPictures() {
    fill(
      shelf,
      pictures.map((url, index) =>
        el("div.picture", {}, el("img", { src: url, alt: `Picture ${index + 1} to send` }),
          el("button.icon-button", {
            type: "button", "aria-label": `Remove picture ${index + 1}`,
            onclick: () => {
              pictures.splice(index, 1);
              showPictures();
              input.focus();
            },
          }, icon("close"))),
      ),
    );
  }

  function grow() {
    input.rows = Math.max(2, Math.min(10, input.value.split("\n").length));
  }

  // Whether the end of the conversation is in sight, and is to stay so. Only scrolling changes that.
  let following = true;
  let planned = false;
  window.addEventListener("scroll", () => {
    const page = document.scrollingElement;
    if (element.isConnected) following = page.scrollHeight - page.scrollTop - page.clientHeight < NEAR_THE_END;
  }, { signal: page.signal, passive: true });

  function follow(answer) {
    if (planned || !following || answer !== turns.at(-1)) return;
    planned = true;
    requestAnimationFrame(() => {
      planned = false;
      if (following) scrollToEnd();
    });
  }

  function scrollToEnd() {
    if (element.isConnected) document.scrollingElement.scrollTop = document.scrollingElement.scrollHeight;
  }

  return {
    element,
    stop,
    focus: () => input.focus({ preventScroll: true }),
    choose(chosen) {
      model = chosen;
      showControls();
    },
  };
}

function sends(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(file);
  });
}
