"use strict";
(() => {
  const root = document.documentElement, body = document.body;
  const tip = document.querySelector(".tip");
  const space = "http://www.w3.org/2000/svg";

  const number = (value, share) => {
    if (share) return (100 * value).toFixed(1) + "%";
    const size = Math.abs(value);
    const text = size >= 1e4 || (size > 0 && size < 1e-3) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
    return text.replace(/-/g, "\u2212");
  };

  const showTip = (event, nodes) => {
    tip.replaceChildren(...nodes);
    tip.style.display = "block";
    const box = tip.getBoundingClientRect();
    const left = event.clientX + 16 + box.width > innerWidth ? event.clientX - 16 - box.width : event.clientX + 16;
    tip.style.left = Math.max(6, left) + "px";
    tip.style.top = Math.max(6, Math.min(event.clientY + 14, innerHeight - box.height - 6)) + "px";
  };
  const hideTip = () => { tip.style.display = "none"; };
  const make = (tag, text, kind) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (kind) node.className = kind;
    return node;
  };

  // --- switches
  const theme = document.getElementById("theme");
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const nameTheme = () => { theme.textContent = dark() ? "Light" : "Dark"; };
  theme.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; nameTheme(); });
  if (location.hash === "#dark" || location.hash === "#light") root.dataset.theme = location.hash.slice(1);
  nameTheme();

  const smooth = document.getElementById("smooth");
  if (smooth) smooth.addEventListener("click", () => {
    smooth.setAttribute("aria-pressed", String(body.classList.toggle("smooth")));
  });

  const hidden = new Set();
  for (const key of document.querySelectorAll(".key")) key.addEventListener("click", () => {
    const slot = key.dataset.slot, shown = hidden.has(slot);
    shown ? hidden.delete(slot) : hidden.add(slot);
    key.setAttribute("aria-pressed", String(shown));
    for (const part of document.querySelectorAll(`[data-slot="${slot}"]:not(.key)`)) part.classList.toggle("off", !shown);
  });

  // --- curves: the step under the pointer, and every line's value there
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) { const middle = (low + high) >> 1; xs[middle] < x ? (low = middle) : (high = middle); }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  };
  for (const drawing of document.querySelectorAll("svg[data-chart]")) {
    const facts = JSON.parse(drawing.dataset.chart), cursor = drawing.querySelector(".cursor");
    const [x0, x1, left, right] = facts.x, [y0, y1, bottom, top] = facts.y;
    drawing.addEventListener("mousemove", (event) => {
      const box = drawing.getBoundingClientRect(), scale = drawing.viewBox.baseVal.width / box.width;
      const x = x0 + ((event.clientX - box.left) * scale - left) / (right - left) * (x1 - x0);
      const lines = facts.series.filter((line) => !hidden.has(String(line.slot)) && line.xs.length);
      if (!lines.length) return;
      const step = lines.map((line) => line.xs[nearest(line.xs, x)])
        .reduce((best, each) => Math.abs(each - x) < Math.abs(best - x) ? each : best);
      const place = left + (step - x0) / (x1 - x0) * (right - left);
      const rule = document.createElementNS(space, "line");
      for (const [name, value] of [["x1", place], ["x2", place], ["y1", top], ["y2", bottom]]) rule.setAttribute(name, value);
      const marks = [rule], rows = [make("b", `${facts.xName.split(",")[0]} ${number(step)}`)];
      for (const line of lines) {
        const index = nearest(line.xs, step);
        if (line.xs[index] !== step) continue;
        const dot = document.createElementNS(space, "circle");
        dot.setAttribute("cx", place); dot.setAttribute("r", 4);
        dot.setAttribute("cy", bottom - (line.ys[index] - y0) / (y1 - y0) * (bottom - top));
        dot.setAttribute("class", `dot c${line.slot}`);
        marks.push(dot);
        const row = make("div", undefined, `row c${line.slot}`);
        let value = number(line.ys[index], facts.share);
        if (line.low && line.low[index] !== line.high[index])
          value += ` (${number(line.low[index], facts.share)} to ${number(line.high[index], facts.share)})`;
        row.append(make("i", undefined, "swatch"), make("span", line.name), make("span", value));
        rows.push(row);
      }
      cursor.replaceChildren(...marks);
      showTip(event, rows);
    });
    drawing.addEventListener("mouseleave", () => { cursor.replaceChildren(); hideTip(); });
  }

  // --- everything that has something to say; on maps, its prompt's other rollouts stand out
  document.addEventListener("mouseover", (event) => {
    const part = event.target.closest ? event.target.closest("[data-tip]") : null;
    if (!part) return;
    showTip(event, [make("span", part.dataset.tip)]);
    const map = part.closest(".map");
    if (map && part.dataset.group !== undefined) {
      map.classList.add("picked");
      for (const each of map.querySelectorAll(".pt")) each.classList.toggle("same", each.dataset.group === part.dataset.group);
    }
    part.addEventListener("mouseleave", () => { hideTip(); if (map) map.classList.remove("picked"); }, { once: true });
  });

  // --- a traced step as a file for a trace viewer
  for (const button of document.querySelectorAll("[data-trace]")) button.addEventListener("click", () => {
    const text = document.getElementById(button.dataset.trace).textContent;
    const link = make("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = button.dataset.trace + ".json";
    link.click();
    URL.revokeObjectURL(link.href);
  });

  // --- where the reader is
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  if ("IntersectionObserver" in window) {
    const seen = new Set();
    const watch = new IntersectionObserver((entries) => {
      for (const entry of entries) entry.isIntersecting ? seen.add(entry.target.id) : seen.delete(entry.target.id);
      const first = [...links.keys()].find((id) => seen.has(id));
      if (first) for (const [id, link] of links) link.classList.toggle("here", id === first);
    }, { rootMargin: "-80px 0px -45% 0px" });
    for (const id of links.keys()) watch.observe(document.getElementById(id));
  }
  root.dataset.ready = "true";
})();
