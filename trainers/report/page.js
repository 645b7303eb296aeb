"use strict";
// The pointer over a chart shows its values at the nearest step, and the same step in all other charts.
const svgElement = (name, attributes) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
};
const number = (value) =>
  Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));

const charts = [...document.querySelectorAll(".chart")].map((figure) => {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const marks = svgElement("g", {});
  figure.querySelector("svg").append(marks);
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  figure.append(tip);
  const steps = [...new Set(data.lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
  return { figure, data, marks, tip, steps };
});
const nearest = (steps, step) => steps.reduce((best, each) => (Math.abs(each - step) < Math.abs(best - step) ? each : best));
const place = (chart, step) => chart.data.x[0] * step + chart.data.x[1];

function draw(chart, step, withTip) {
  const { data, marks, tip } = chart;
  const x = place(chart, step);
  marks.replaceChildren(svgElement("line", { class: "cross", x1: x, x2: x, y1: data.top, y2: data.bottom }));
  const rows = [];
  for (const line of data.lines) {
    const index = line.steps.indexOf(step);
    if (index < 0) continue;
    const fill = `fill: var(--series-${line.colour})`;
    marks.append(svgElement("circle", { class: "dot", cx: x, cy: line.y[index], r: 3.5, style: fill }));
    rows.push([line, line.values[index]]);
  }
  tip.hidden = !withTip || !rows.length;
  if (tip.hidden) return;
  const head = document.createElement("b");
  head.textContent = `step ${step}`;
  tip.replaceChildren(head);
  for (const [line, value] of rows) {
    const row = document.createElement("div");
    const label = document.createElement("span");
    const chip = document.createElement("i");
    chip.className = "chip";
    chip.style.setProperty("--colour", `var(--series-${line.colour})`);
    label.append(chip, line.run && data.lines.some((other) => other.label !== line.label)
      ? `${line.run} ${line.label.split("/").pop()}` : line.run || line.label.split("/").slice(1).join("/"));
    const text = document.createElement("b");
    text.textContent = number(value);
    row.append(label, text);
    tip.append(row);
  }
  const width = chart.figure.clientWidth;
  const at = (x / chart.figure.querySelector("svg").viewBox.baseVal.width) * width;
  tip.style.left = `${Math.max(0, at > width / 2 ? at - tip.offsetWidth - 12 : Math.min(at + 12, width - tip.offsetWidth))}px`;
}
function clear() {
  for (const { marks, tip } of charts) {
    marks.replaceChildren();
    tip.hidden = true;
  }
}
for (const chart of charts) {
  chart.figure.addEventListener("pointermove", (event) => {
    const box = chart.figure.querySelector("svg").getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * chart.figure.querySelector("svg").viewBox.baseVal.width;
    const step = nearest(chart.steps, (x - chart.data.x[1]) / chart.data.x[0]);
    for (const each of charts) draw(each, each === chart ? step : nearest(each.steps, step), each === chart);
  });
  chart.figure.addEventListener("pointerleave", clear);
}

// The search field hides the rows of its table that lack the text.
for (const table of document.querySelectorAll(".samples")) {
  const rows = [...table.querySelectorAll("tbody tr")];
  table.querySelector("input").addEventListener("input", (event) => {
    const wanted = event.target.value.toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    table.querySelector(".count").textContent = rows.filter((row) => !row.hidden).length;
  });
}
