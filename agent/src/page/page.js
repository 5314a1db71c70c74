// Shows /status.json, and asks for it again every few seconds while somebody looks. What it gets is text and numbers, and becomes text:
// nothing here is ever read as HTML.
"use strict";

const PAUSE = 5000;
const SVG = "http://www.w3.org/2000/svg";
const STATES = ["starting", "running", "pausing", "paused", "resuming", "unreachable", "stopping"];

const byId = (id) => document.getElementById(id);

function make(tag, text, name) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (name) element.className = name;
  return element;
}

function fill(id, children) {
  byId(id).replaceChildren(...children);
}

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) {
    count /= 1024;
    unit += 1;
  }
  return `${count < 10 && unit > 0 ? count.toFixed(1) : Math.round(count)} ${units[unit]}`;
}

function span(seconds) {
  if (seconds < 60) return `${Math.max(0, seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 2 * 86400) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} d`;
}

// A line of what was used; where nothing is known it has a gap. `most` is the upper edge.
function sparkline(points, most, label) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 100 20");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", label);
  const step = 100 / Math.max(1, points.length - 1);
  let run = [];
  const end = () => {
    if (run.length > 1) {
      const line = document.createElementNS(SVG, "polyline");
      line.setAttribute("points", run.join(" "));
      svg.append(line);
    }
    run = [];
  };
  points.forEach((point, index) => {
    if (point === null) return end();
    const height = most > 0 ? Math.min(1, point / most) : 0;
    run.push(`${(index * step).toFixed(1)},${(19 - 18 * height).toFixed(1)}`);
  });
  end();
  return svg;
}

function last(points) {
  for (let index = points.length - 1; index >= 0; index -= 1) {
    if (points[index] !== null) return points[index];
  }
  return null;
}

function cell(name, ...children) {
  const td = make("td");
  td.dataset.name = name;
  td.append(...children);
  return td;
}

function used(name, points, most, shown) {
  const now = last(points);
  if (now === null) return cell(name, make("span", "–"));
  return cell(name, make("span", shown(now)), sparkline(points, most, `${name}: ${shown(now)}`));
}

function sandbox(one, now) {
  const row = make("tr");
  const id = make("th", one.id);
  id.scope = "row";
  const state = STATES.includes(one.state) ? one.state : "";
  const mebibytes = (count) => bytes(count * 1048576);
  row.append(
    id,
    cell("State", make("span", one.held ? `${one.state}, held` : one.state, state)),
    used(`Processor (${one.vcpus})`, one.cpu_percent, 100, (percent) => `${percent} %`),
    used("Memory", one.memory_mb, one.memory_limit_mb, (count) => `${mebibytes(count)} of ${mebibytes(one.memory_limit_mb)}`),
    used("Disk", one.disk_mb, Math.max(1, ...one.disk_mb) * 1.2, mebibytes),
    cell("Age", make("span", span(now - one.created_at_unix))),
  );
  return row;
}

function meter(value, most, low, label) {
  const element = make("meter");
  element.max = Math.max(1, most);
  element.value = value;
  if (low !== undefined) {
    element.low = low;
    element.high = low;
    element.optimum = most;
  }
  element.setAttribute("aria-label", label);
  return element;
}

function figure(name, text, ...more) {
  const dd = make("dd", text);
  dd.append(...more);
  return [make("dt", name), dd];
}

function host(status) {
  const { host: figures } = status;
  const list = [];
  list.push(...figure("Sandboxes", `${figures.sandboxes} of at most ${figures.max_sandboxes}`, meter(figures.sandboxes, figures.max_sandboxes, undefined, "Sandboxes")));
  if (figures.disk) {
    const { free, reserve } = figures.disk;
    list.push(...figure("Disk", `${bytes(free)} free; ${bytes(reserve)} kept${free < reserve ? ", creates and resumes are refused" : ""}`, meter(free, Math.max(free, 2 * reserve), reserve, "Free disk")));
  }
  if (figures.memory) {
    const { available, total } = figures.memory;
    list.push(...figure("Memory", `${bytes(available)} of ${bytes(total)} available`, meter(available, total, total / 10, "Available memory")));
  }
  if (figures.load !== null) list.push(...figure("Load", `${figures.load.toFixed(2)} on ${figures.processors} processors`));
  list.push(...figure("Events to deliver", String(figures.outbox_events)));
  list.push(...figure("Version", status.version));
  return list;
}

function finding(one) {
  const words = { ok: "well", warning: "warning", problem: "problem", not_checked: "not seen" };
  const item = make("li");
  item.append(make("span", words[one.state] ?? one.state, `mark ${words[one.state] ? one.state : ""}`), `${one.check}: ${one.said}`);
  if (one.advice) item.append(make("span", one.advice, "advice"));
  return item;
}

function change(one) {
  const at = new Date(one.unix * 1000);
  const item = make("li");
  const time = make("time", at.toISOString().replace("T", " ").slice(0, 19));
  time.dateTime = at.toISOString();
  item.append(time, make("code", one.id), `${one.from} → ${one.to}`);
  return item;
}

function show(status) {
  const word = status.ready ? "serving" : "taking over what runs";
  fill("host", host(status));
  fill("sandboxes", status.sandboxes.map((one) => sandbox(one, status.unix)));
  byId("more").textContent = status.more > 0 ? `and ${status.more} more, which roost ls has` : "";
  const bad = status.findings.filter((one) => one.state !== "ok");
  fill("findings", bad.length > 0 ? bad.map(finding) : [make("li", status.findings.length > 0 ? "All is well." : "Not looked yet.")]);
  fill("changes", status.changes.length > 0 ? status.changes.map(change) : [make("li", "None since the agent was started.")]);
  byId("state").textContent = `${word}; as of ${new Date(status.unix * 1000).toISOString().slice(11, 19)} UTC`;
  byId("state").className = "";
}

async function ask() {
  try {
    const answer = await fetch("/status.json", { cache: "no-store" });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    show(await answer.json());
  } catch (error) {
    byId("state").textContent = `The agent does not answer (${error.message}); what is below may be old.`;
    byId("state").className = "bad";
  }
}

async function watch() {
  if (!document.hidden) await ask();
  setTimeout(watch, PAUSE);
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) ask();
});
watch();
