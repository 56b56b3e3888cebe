"use strict";
(() => {
  const section = document.getElementById("curves");
  if (!section) return;
  const charts = JSON.parse(document.getElementById("curve-data").textContent);
  const buttons = [...section.querySelectorAll("button[data-curve]")];
  const box = document.getElementById("chart"), text = document.getElementById("chart-text");
  let current = 0;

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

  function traces(chart) {
    const line = (side, more) => ({ x: chart.steps, y: chart[side], name: side, mode: chart.steps.length === 1 ? "markers" : "lines", ...more });
    const found = [
      line("reference", { line: { color: colour("reference"), width: 4 } }),
      line("candidate", { line: { color: colour("candidate"), width: 2, dash: "6px,4px" } }),
    ];
    for (const [side, [x, y]] of Object.entries(chart.only))
      found.push({ x, y, name: `${side} alone`, mode: "markers", marker: { color: colour(side), symbol: "x", size: 5 } });
    const below = { yaxis: "y2", mode: "lines+markers", line: { color: colour("bad"), width: 1 }, marker: { size: 4 } };
    if (chart.distance.some((y) => y !== null)) found.push({ x: chart.steps, y: chart.distance, name: "distance", ...below });
    const top = Math.max(Number.MIN_VALUE, ...chart.distance) || 1;
    if (chart.odd.length)
      found.push({ x: chart.odd, y: chart.odd.map(() => top), name: "differs without a distance", yaxis: "y2", mode: "markers", marker: { color: colour("doubt"), symbol: "x" } });
    return found;
  }

  function layout(chart, below) {
    const axis = { gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("quiet"), automargin: true, exponentformat: "e" };
    const marked = chart.first === null ? [] : [chart.first];
    return {
      height: 440, margin: { l: 50, r: 12, t: 56, b: 40 }, hovermode: "x unified", dragmode: "zoom",
      paper_bgcolor: colour("back"), plot_bgcolor: colour("back"), font: { color: colour("text"), family: "system-ui, sans-serif" },
      hoverlabel: { bgcolor: colour("panel"), font: { color: colour("text") } },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      xaxis: { ...axis, exponentformat: "none", separatethousands: true, title: { text: "step" }, anchor: below ? "y2" : "y" },
      yaxis: { ...axis, domain: below ? [0.42, 1] : [0, 1], title: { text: "value" } },
      yaxis2: { ...axis, domain: [0, 0.36], type: "log", visible: below, title: { text: "distance" } },
      shapes: marked.map((x) => ({ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: { color: colour("bad"), width: 1.5, dash: "dot" } })),
      annotations: marked.map((x) => ({ x, y: below ? 0.39 : 0, yref: "paper", showarrow: false, xanchor: "auto", bgcolor: colour("back"), font: { color: colour("bad") }, text: `first at step ${x}` })),
    };
  }

  function draw() {
    const chart = charts[current], plotly = window.Plotly;
    if (plotly && (!chart || box.dataset.drawn)) plotly.purge(box);
    delete box.dataset.drawn;
    if (!chart) {
      text.textContent = "The values of this curve were not kept.";
      return;
    }
    const thinned = chart.thinned && ` Drawn: ${chart.thinned[0]} of ${chart.thinned[1]} steps; of every stretch the extremes, and the step that differs most.`;
    text.textContent = `${chart.name}: ${chart.summary}.${thinned || ""}`;
    box.setAttribute("aria-label", text.textContent);
    if (!plotly) return;
    const data = traces(chart);
    plotly.newPlot(box, data, layout(chart, data.some((each) => each.yaxis === "y2")), {
      displaylogo: false, responsive: true, modeBarButtonsToRemove: ["toImage", "select2d", "lasso2d"],
    });
    box.dataset.drawn = current;
  }

  function choose(index, focus) {
    current = Math.min(Math.max(index, 0), buttons.length - 1);
    buttons.forEach((button, i) => {
      button.setAttribute("aria-pressed", i === current);
      button.tabIndex = i === current ? 0 : -1;
    });
    if (focus) buttons[current].focus();
    draw();
  }

  section.querySelector(".list").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) choose(Number(button.dataset.curve));
  });
  section.querySelector(".list").addEventListener("keydown", (event) => {
    const to = { ArrowDown: current + 1, ArrowRight: current + 1, ArrowUp: current - 1, ArrowLeft: current - 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    choose(to, true);
  });
  const again = (printing) => {
    document.documentElement.classList.toggle("printing", printing);
    draw();
  };
  addEventListener("beforeprint", () => again(true));
  addEventListener("afterprint", () => again(false));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  document.addEventListener("DOMContentLoaded", () => choose(0));
})();
