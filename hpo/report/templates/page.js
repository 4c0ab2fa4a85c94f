"use strict";

// Each figure is drawn when it comes near the screen, and all of them before the page is printed.
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

const folds = [...document.querySelectorAll("details")];
const opened = () => folds.filter((fold) => fold.open);
let before = [];

addEventListener("beforeprint", () => {
  before = opened();
  folds.forEach((fold) => (fold.open = true));
  for (const figure of figures) {
    draw(figure);
    const columns = figure.closest(".grid") ? 2 : 1;
    Plotly.relayout(figure.querySelector(".canvas"), { autosize: false, width: PRINTED_WIDTH / columns - 10 });
  }
});

addEventListener("afterprint", () => {
  folds.forEach((fold) => (fold.open = before.includes(fold)));
  for (const figure of figures) Plotly.relayout(figure.querySelector(".canvas"), { autosize: true, width: null });
});
