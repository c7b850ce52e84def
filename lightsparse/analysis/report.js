"use strict";
// Tables sort by data-key: as numbers where both are, else as text; cells without a key stay last.
function order(a, b) {
  if (a === "" || b === "") return a === b ? 0 : a === "" ? Infinity : -Infinity;
  const x = Number(a), y = Number(b);
  return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
}
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const text = Number(table.dataset.text);
  for (const row of body.rows) [...row.cells].forEach((cell, i) => { if (i < text) cell.style.textAlign = "left"; });
  [...table.tHead.rows[0].cells].forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => row.cells[column].dataset.key;
    [...body.rows].sort((a, b) => {
      const found = order(key(a), key(b));
      return Math.abs(found) === Infinity || up ? found : -found;
    }).forEach(row => body.append(row));
  }));
}

// Curves on a canvas: one line per run, coloured by group; a drag zooms into a range of the horizontal axis.
const runs = JSON.parse(document.getElementById("curves").textContent);
const [canvas, metric, axis, log, whole, under] =
  ["plot", "metric", "axis", "log", "whole", "under"].map(id => document.getElementById(id));
let range = null, drag = null;
const left = 62, right = 10, top_ = 10, bottom = 34;
const short = v => {
  const size = Math.abs(v);
  for (const [unit, letter] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (size >= unit) return +(v / unit).toPrecision(3) + letter;
  return String(+v.toPrecision(3));
};
const lines = () => runs.map(run => ({...run, points: run.rows
  .filter(row => axis.value in row && metric.value in row)
  .map(row => [row[axis.value], row[metric.value]])
  .filter(([, y]) => !log.checked || y > 0)}));
function ticks(low, high, count) {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find(m => m * power >= rough) * power, found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step / 1e6; v += step) found.push(+v.toPrecision(12));
  return found;
}
function frame() {
  const all = lines().flatMap(line => line.points);
  if (!all.length) return null;
  const xs = all.map(p => p[0]);
  const [x0, x1] = range || [Math.min(...xs), Math.max(...xs)];
  const seen = all.filter(p => p[0] >= x0 && p[0] <= x1).map(p => log.checked ? Math.log10(p[1]) : p[1]);
  if (!seen.length) return null;
  let y0 = Math.min(...seen), y1 = Math.max(...seen);
  const room = (y1 - y0) * 0.06 || Math.abs(y0) * 0.05 || 1;
  y0 -= room; y1 += room;
  const w = canvas.clientWidth, h = canvas.clientHeight;
  return {x0, x1, y0, y1, w, h,
    x: v => left + (v - x0) / ((x1 - x0) || 1) * (w - left - right),
    y: v => h - bottom - ((log.checked ? Math.log10(v) : v) - y0) / (y1 - y0) * (h - top_ - bottom),
    back: px => x0 + (px - left) / (w - left - right) * (x1 - x0)};
}
function draw() {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = canvas.clientWidth * ratio; canvas.height = canvas.clientHeight * ratio;
  const pen = canvas.getContext("2d"), f = frame();
  pen.scale(ratio, ratio);
  pen.font = "12px system-ui, sans-serif";
  pen.fillStyle = "#5b5e70";
  if (!f) { pen.fillText("no run has this metric", left, 40); return; }
  pen.strokeStyle = "#e3e4ec"; pen.lineWidth = 1;
  pen.textAlign = "center";
  for (const v of ticks(f.x0, f.x1, f.w / 110)) {
    pen.beginPath(); pen.moveTo(f.x(v), top_); pen.lineTo(f.x(v), f.h - bottom); pen.stroke();
    pen.fillText(short(v), Math.min(f.x(v), f.w - 16), f.h - bottom + 15);
  }
  pen.fillText(axis.selectedOptions[0].text, (f.w + left) / 2, f.h - 4);
  pen.textAlign = "right";
  for (const v of ticks(f.y0, f.y1, 6)) {
    const value = log.checked ? 10 ** v : v, y = f.y(value);
    pen.beginPath(); pen.moveTo(left, y); pen.lineTo(f.w - right, y); pen.stroke();
    pen.fillText(short(value), left - 6, y + 4);
  }
  pen.save();
  pen.beginPath(); pen.rect(left, top_, f.w - left - right, f.h - top_ - bottom); pen.clip();
  pen.lineWidth = 1.5;
  for (const line of lines()) {
    pen.strokeStyle = pen.fillStyle = line.colour;
    pen.beginPath();
    line.points.forEach(([x, y], i) => i ? pen.lineTo(f.x(x), f.y(y)) : pen.moveTo(f.x(x), f.y(y)));
    pen.stroke();
    if (line.points.length < 40) for (const [x, y] of line.points) {
      pen.beginPath(); pen.arc(f.x(x), f.y(y), 2.2, 0, 7); pen.fill();
    }
  }
  if (drag) {
    pen.fillStyle = "rgba(41, 51, 122, .12)";
    pen.fillRect(drag.from, top_, drag.to - drag.from, f.h - top_ - bottom);
  }
  pen.restore();
}
const at = event => event.clientX - canvas.getBoundingClientRect().left;
canvas.addEventListener("pointerdown", event => {
  drag = {from: at(event), to: at(event)};
  canvas.setPointerCapture(event.pointerId);
});
canvas.addEventListener("pointermove", event => {
  const f = frame();
  if (!f) return;
  if (drag) { drag.to = at(event); draw(); return; }
  let best = null;
  for (const line of lines()) for (const [x, y] of line.points) {
    const away = Math.hypot(f.x(x) - at(event), f.y(y) - (event.clientY - canvas.getBoundingClientRect().top));
    if (away < 24 && (!best || away < best.away)) best = {away, line, x, y};
  }
  under.textContent = best
    ? `${best.line.run} (${best.line.group}): ${best.y.toPrecision(5)} at ${short(best.x)}`
    : "Drag over a range to look closer.";
});
canvas.addEventListener("pointerup", () => {
  const f = frame();
  if (f && drag && Math.abs(drag.to - drag.from) > 8)
    range = [f.back(Math.min(drag.from, drag.to)), f.back(Math.max(drag.from, drag.to))];
  drag = null;
  draw();
});
canvas.addEventListener("pointercancel", () => { drag = null; draw(); });
whole.addEventListener("click", () => { range = null; draw(); });
axis.addEventListener("change", () => { range = null; draw(); });
metric.addEventListener("change", draw);
log.addEventListener("change", draw);
window.addEventListener("resize", draw);
const shown = new Map(runs.map(run => [run.group, run.colour]));
for (const [group, colour] of shown) {
  const item = document.createElement("li"), mark = document.createElement("span");
  mark.style.background = colour;
  item.append(mark, group);
  document.getElementById("legend").append(item);
}
draw();
