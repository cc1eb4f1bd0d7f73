// Models that give numbers: embeddings, which are compared, ranking and moderation.

import { el } from "../../dom.js";
import { plural } from "../../format.js";
import { facts, field, lines, requestForm, send } from "./parts.js";

const STEPS = 6;

function scrollable(label, table) {
  return el("div.table", { tabIndex: 0, role: "region", "aria-label": label }, table);
}

async function ask(page, path, body, signal) {
  const began = performance.now();
  const { response, ...sent } = await send(page, path, { body, signal });
  const answer = await response.json();
  return { answer, sent: { ...sent, took: (performance.now() - began) / 1000 } };
}

/** Texts, whose embeddings are compared with each other. */
export function createEmbeddings(page) {
  let model = null;
  const input = el("textarea", {
    rows: 5, required: true,
    value: "How do I reset my password?\nI cannot sign in to my account.\nThe weather is fine today.",
  });
  const dimensions = el("input", { type: "number", min: 1, step: 1, placeholder: "all" });

  const { element, stop, form } = requestForm(page, {
    controls: [field("Texts, one per line", input), el("div.fields", {}, field("Dimensions", dimensions))],
    action: "Compare",
    run: async (signal) => {
      const texts = lines(input);
      const body = { model: model.id, input: texts };
      if (dimensions.value) body.dimensions = dimensions.valueAsNumber;
      const { answer, sent } = await ask(page, "v1/embeddings", body, signal);
      const vectors = answer.data.toSorted((a, b) => a.index - b.index).map((each) => each.embedding);
      return [
        similarities(texts, vectors),
        facts(page, sent, `${vectors[0].length} dimensions`, answer.usage?.prompt_tokens > 0 && plural(answer.usage.prompt_tokens, "token")),
        el("details.raw", {}, el("summary", {}, "The vectors"),
          vectors.map((vector, index) => el("p.mono", {}, `${index + 1}: ${vector.slice(0, 8).map((value) => value.toFixed(4)).join(", ")}${vector.length > 8 ? ", …" : ""}`))),
      ];
    },
  });
  return { element, stop, focus: () => form.querySelector("textarea").focus({ preventScroll: true }), choose: (chosen) => (model = chosen) };
}

function similarities(texts, vectors) {
  const norms = vectors.map((vector) => Math.hypot(...vector));
  const cosine = (a, b) => vectors[a].reduce((sum, value, index) => sum + value * vectors[b][index], 0) / (norms[a] * norms[b]);
  const cell = (a, b) => {
    const value = a === b ? 1 : cosine(a, b);
    const step = Math.max(0, Math.min(STEPS - 1, Math.floor(value * STEPS)));
    return el("td.number", { class: `step-${step}` }, Number.isFinite(value) ? value.toFixed(3) : "–");
  };
  return scrollable("Similarities",
    el("table.similarities", {},
      el("caption", {}, "Cosine similarity: 1 is the same direction, 0 has nothing in common"),
      el("thead", {}, el("tr", {}, el("th", {}, "Text"), texts.map((_, index) => el("th.number", { scope: "col" }, index + 1)))),
      el("tbody", {}, texts.map((text, row) => el("tr", {}, el("th", { scope: "row" }, `${row + 1}. ${text}`), texts.map((_, column) => cell(row, column)))))));
}

/** Documents, ordered by how well they answer a query. */
export function createRanking(page) {
  let model = null;
  const query = el("input", { required: true, value: "How do I reset my password?" });
  const documents = el("textarea", {
    rows: 5, required: true,
    value: "Open the settings, and choose Forgotten password.\nThe office is closed on Sundays.\nPasswords have twelve characters at least.",
  });
  const most = el("input", { type: "number", min: 1, step: 1, placeholder: "all" });

  const { element, stop, form } = requestForm(page, {
    controls: [field("Query", query), field("Documents, one per line", documents), el("div.fields", {}, field("How many results", most))],
    action: "Rank",
    run: async (signal) => {
      const texts = lines(documents);
      const body = { model: model.id, query: query.value, documents: texts };
      if (most.value) body.top_n = most.valueAsNumber;
      const { answer, sent } = await ask(page, "v1/rerank", body, signal);
      const rows = answer.results.map((each, index) =>
        el("tr", {}, el("td.number", {}, index + 1), el("td.number", {}, each.relevance_score.toFixed(4)), el("td", {}, texts[each.index])));
      return [
        scrollable("Results", el("table", {},
          el("thead", {}, el("tr", {}, el("th.number", {}, "Rank"), el("th.number", {}, "Score"), el("th", {}, "Document"))),
          el("tbody", {}, rows))),
        facts(page, sent),
      ];
    },
  });
  return { element, stop, focus: () => form.querySelector("input").focus({ preventScroll: true }), choose: (chosen) => (model = chosen) };
}

/** Texts that are judged. */
export function createModeration(page) {
  let model = null;
  const input = el("textarea", { rows: 4, required: true });
  const { element, stop, form } = requestForm(page, {
    controls: [field("Texts, one per line", input)],
    action: "Judge",
    run: async (signal) => {
      const texts = lines(input);
      const { answer, sent } = await ask(page, "v1/moderations", { model: model.id, input: texts }, signal);
      return [
        answer.results.map((each, index) => verdict(texts[index], each)),
        facts(page, sent),
      ];
    },
  });
  return { element, stop, focus: () => form.querySelector("textarea").focus({ preventScroll: true }), choose: (chosen) => (model = chosen) };
}

function verdict(text, result) {
  const judged = Object.entries(result.category_scores)
    .filter(([name]) => result.categories[name] || (result.category_applied_input_types?.[name]?.length ?? 1) > 0)
    .sort((a, b) => b[1] - a[1]);
  return scrollable(`Verdict on: ${text}`,
    el("table", {},
      el("caption", {}, text, " ", el("span.badge", { class: result.flagged ? "bad" : "good" }, result.flagged ? "flagged" : "not flagged")),
      el("thead", {}, el("tr", {}, el("th", {}, "Category"), el("th.number", {}, "Score"), el("th", {}, "Applies"))),
      el("tbody", {}, judged.map(([name, score]) =>
        el("tr", {}, el("td", {}, name), el("td.number", {}, score.toFixed(4)), el("td", { class: result.categories[name] ? "bad" : "" }, result.categories[name] ? "yes" : "no"))))));
}
