// Bars by day, one above the other for each group; drawn by hand, with a table that has the same.

import { append, el, fill, svg } from "../../dom.js";
import { count, plural } from "../../format.js";

const HEIGHT = 200;
const LEFT = 44;
const BOTTOM = 22;
const TOP = 8;
const SERIES = 6;
const DAY = 86_400_000;

/** Return the last days up to `now`, in UTC, as 2026-11-28, the oldest first. */
export function lastDays(number, now) {
  return Array.from({ length: number }, (_, index) => new Date(now - (number - 1 - index) * DAY).toISOString().slice(0, 10));
}

/** Return a day such as 28 Nov. */
export function dayName(day) {
  return new Date(`${day}T00:00:00Z`).toLocaleDateString(undefined, { day: "numeric", month: "short", timeZone: "UTC" });
}

/**
 * Return the largest groups with their values by day, and the others as one.
 *
 * @param {object[]} rows with `day` and the group's name.
 * @param {string} group the field that has the name.
 * @param {Function} value of a row.
 */
export function series(rows, group, value) {
  const groups = new Map();
  for (const row of rows) {
    if (!groups.has(row[group])) groups.set(row[group], { name: row[group], total: 0, days: new Map() });
    const each = groups.get(row[group]);
    each.total += value(row);
    each.days.set(row.day, (each.days.get(row.day) ?? 0) + value(row));
  }
  const sorted = [...groups.values()].filter((each) => each.total > 0).sort((a, b) => b.total - a.total);
  if (sorted.length <= SERIES) return sorted;
  const others = { name: `${sorted.length - SERIES + 1} others`, total: 0, days: new Map() };
  for (const each of sorted.splice(SERIES - 1)) {
    others.total += each.total;
    for (const [day, amount] of each.days) others.days.set(day, (others.days.get(day) ?? 0) + amount);
  }
  return [...sorted, others];
}

/** Return a chart that fits its place; `what` is what is counted: "Tokens". */
export function chart(days, groups, what, label = (name) => name) {
  const total = (day) => groups.reduce((sum, each) => sum + (each.days.get(day) ?? 0), 0);
  const most = Math.max(...days.map(total));
  const scale = niceScale(most);
  const busiest = days.find((day) => total(day) === most);
  const summary = most > 0
    ? `${what} by day for ${plural(days.length, "day")}: ${count(days.reduce((sum, day) => sum + total(day), 0))} in all, most on ${dayName(busiest)} with ${count(most)}.`
    : `${what} by day: none.`;
  const place = el("div.chart");

  function draw(width) {
    const image = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img", "aria-label": summary });
    const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / scale.top);
    for (const value of scale.marks) {
      append(image, [
        svg("line", { x1: LEFT, x2: width, y1: y(value), y2: y(value), class: "grid" }),
        svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, count(value)),
      ]);
    }
    const step = (width - LEFT) / days.length;
    const every = Math.ceil(days.length / Math.max(2, Math.floor((width - LEFT) / 70)));
    for (const [index, day] of days.entries()) {
      const x = LEFT + index * step;
      let below = 0;
      const bar = svg("g");
      append(bar, svg("title", {}, [dayName(day), ...groups.map((each) => [each, each.days.get(day) ?? 0]).filter(([, value]) => value).map(([each, value]) => `${label(each.name)}: ${count(value)}`)].join("\n")));
      // The ground of the bar makes the title appear over the whole day.
      append(bar, svg("rect", { x, y: TOP, width: step, height: HEIGHT - TOP - BOTTOM, class: "day" }));
      for (const [number, each] of groups.entries()) {
        const value = each.days.get(day) ?? 0;
        if (!value) continue;
        const height = y(below) - y(below + value);
        append(bar, svg("rect", { x: x + step * 0.12, y: y(below + value), width: step * 0.76, height: Math.max(height, 1), class: `series-${number}` }));
        below += value;
      }
      append(image, bar);
      if ((days.length - 1 - index) % every === 0 && x > LEFT - 1) {
        const last = index === days.length - 1;
        append(image, svg("text", { x: last ? width : x + step / 2, y: HEIGHT - 6, "text-anchor": last ? "end" : "middle" }, dayName(day)));
      }
    }
    fill(place, image);
  }

  new ResizeObserver(([entry]) => {
    const width = Math.floor(entry.contentRect.width);
    if (width > 0 && Number(place.firstChild?.getAttribute("width")) !== width) draw(width);
  }).observe(place);
  return el("figure.usage-chart", {},
    place,
    groups.length > 0 && el("ul.series-names", {}, groups.map((each, index) =>
      el("li", {}, swatch(index), el("span", {}, label(each.name)), el("span.quiet", {}, count(each.total))))),
    asTable(days.toReversed().filter((day) => total(day)), groups, what, label));
}

function swatch(index) {
  return svg("svg", { viewBox: "0 0 10 10", class: "swatch", "aria-hidden": "true" }, svg("rect", { width: 10, height: 10, rx: 2, class: `series-${index}` }));
}

function asTable(days, groups, what, label) {
  if (!days.length) return null;
  return el("details", {},
    el("summary", {}, "As a table"),
    el("div.table", { tabIndex: 0, role: "region", "aria-label": `${what} by day` },
      el("table", {},
        el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Day (UTC)"), groups.map((each) => el("th.number", { scope: "col" }, label(each.name))))),
        el("tbody", {}, days.map((day) =>
          el("tr", {}, el("th", { scope: "row" }, day), groups.map((each) => el("td.number", {}, (each.days.get(day) ?? 0).toLocaleString()))))))));
}

/** Return the top of an axis, and at most five marks on it that are round numbers. */
export function niceScale(most) {
  if (most <= 0) return { top: 1, marks: [0] };
  const rough = most / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(1, [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough));
  const marks = [];
  for (let value = 0; value < most + step; value += step) marks.push(value);
  return { top: marks.at(-1), marks };
}
