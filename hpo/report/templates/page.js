"use strict";

// Figures near the screen are drawn first, the others one after another: a print or a picture of the page has all.
const figures = [...document.querySelectorAll("figure.plot")];
const PRINTED_WIDTH = 680; // CSS pixels: A4 and Letter, less their margins

function draw(figure) {
  const canvas = figure.querySelector(".canvas");
  if (canvas.classList.contains("js-plotly-plot")) return;
  const { data, layout } = JSON.parse(figure.querySelector("script").textContent);
  Plotly.newPlot(canvas, data, layout, {
    responsive: true,
    displaylogo: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  });
}

const near = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      near.unobserve(entry.target);
      draw(entry.target);
    }
  },
  { rootMargin: "600px 0px" },
);
figures.forEach((figure) => near.observe(figure));

function drawNext() {
  const figure = figures.find((each) => !each.querySelector(".js-plotly-plot"));
  if (!figure) return;
  draw(figure);
  setTimeout(drawNext, 20);
}
addEventListener("load", () => setTimeout(drawNext, 500));

// A box that is wider than the screen says that it scrolls.
const boxes = new ResizeObserver((entries) => {
  for (const { target } of entries) target.classList.toggle("wider", target.scrollWidth > target.clientWidth);
});
document.querySelectorAll(".scroll, .plot[tabindex]").forEach((box) => boxes.observe(box));

const folds = [...document.querySelectorAll("details")];
const opened = () => folds.filter((fold) => fold.open);
let before = [];

addEventListener("beforeprint", () => {
  before = opened();
  folds.forEach((fold) => (fold.open = true));
  for (const figure of figures) {
    draw(figure);
    const canvas = figure.querySelector(".canvas");
    const width = PRINTED_WIDTH / (figure.closest(".grid") ? 2 : 1) - 10;
    const needed = Math.max(width, parseFloat(canvas.style.minWidth) || 0);
    Plotly.relayout(canvas, { autosize: false, width: needed });
    canvas.style.zoom = width / needed;
  }
});

addEventListener("afterprint", () => {
  folds.forEach((fold) => (fold.open = before.includes(fold)));
  for (const figure of figures) {
    const canvas = figure.querySelector(".canvas");
    canvas.style.zoom = 1;
    Plotly.relayout(canvas, { autosize: true, width: null });
  }
});
