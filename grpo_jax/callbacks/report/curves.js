// The charts, drawn by Plotly when they come into sight.
const COLOURS = ["#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#eab308", "#06b6d4", "#ec4899", "#84cc16", "#94a3b8"];

async function startCurves(charts) {
  const script = $("plotly").textContent ? await inflateText("plotly") : "";
  if (!script) {
    $("no-curves").hidden = false;
    return;
  }
  // Added as a script of its own, with the nonce that the page's policy asks for.
  document.head.append(element("script", { textContent: script, nonce: NONCE }));
  const drawn = new Set();
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting || drawn.has(entry.target)) continue;
      drawn.add(entry.target);
      draw(entry.target);
    }
  }, { rootMargin: "200px" });
  for (const chart of charts) {
    const plot = element("div", { className: "plot" });
    plot.chart = chart;
    const title = element("h2", { textContent: chart.title }, element("small", { textContent: chart.unit }));
    $("charts").append(element("div", { className: "chart" }, title, plot));
    seen.observe(plot);
  }
  const again = () => drawn.forEach(draw);
  document.addEventListener("theme", again);
  $("smooth").oninput = again;
}

function smoothed(values, weight) {
  // Exponential mean, divided by the weights so far, so that it does not start at 0.
  let sum = 0, total = 0;
  return values.map((value) => {
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

function traces(chart, weight) {
  const out = [];
  chart.traces.forEach((trace, i) => {
    const line = { color: COLOURS[i % COLOURS.length], width: 2 };
    const common = { x: trace.x, name: escaped(trace.name), type: "scatter", hovertemplate: "%{y:.4~g}" };
    if (chart.stacked) {
      out.push({ ...common, y: trace.y, mode: "lines", stackgroup: "all", line: { ...line, width: 0.5 } });
      return;
    }
    const mode = trace.x.length < 40 ? "lines+markers" : "lines";
    const marker = { size: 5 };
    if (weight > 0 && trace.x.length > 2) {
      out.push({ ...common, y: trace.y, mode: "lines", line, opacity: 0.25, showlegend: false, hoverinfo: "skip", hovertemplate: null });
      out.push({ ...common, y: smoothed(trace.y, weight), mode, marker, line });
    } else {
      out.push({ ...common, y: trace.y, mode, marker, line });
    }
  });
  return out;
}

// Where an axis of its own choice would show little: a curve that is constant, the long first step of the phases.
function range(chart) {
  const values = chart.traces.flatMap((trace) => trace.y);
  const low = Math.min(...values), high = Math.max(...values);
  if (low === high && low >= 0 && !chart.log) return [0, 2 * low || 1];
  if (!chart.stacked) return null;
  const totals = new Map();
  for (const { x, y } of chart.traces) x.forEach((step, i) => totals.set(step, (totals.get(step) ?? 0) + y[i]));
  const later = [...totals.values()].slice(1);
  return later.length > 1 ? [0, 1.1 * Math.max(...later)] : null;
}

// Plotly reads a few tags in names; a name is data.
const escaped = (name) => name.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

function draw(plot) {
  const chart = plot.chart;
  const axis = { gridcolor: colour("line"), linecolor: colour("line"), zeroline: false, automargin: true };
  const last = Math.max(...chart.traces.flatMap(({ x }) => x.slice(-1)));
  const layout = {
    autosize: true,
    margin: { l: 44, r: 10, t: 8, b: 30 },
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    font: { color: colour("quiet"), size: 11, family: "system-ui, sans-serif" },
    showlegend: chart.traces.length > 1,
    legend: { orientation: "h", y: -0.14, x: 0 },
    hovermode: "x unified",
    modebar: { bgcolor: "transparent", color: colour("quiet"), activecolor: colour("accent") },
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink") } },
    xaxis: { ...axis, hoverformat: "d", tickformat: "d", ...(last < 8 ? { dtick: 1 } : {}) },
    yaxis: { ...axis, tickformat: chart.form, type: chart.log ? "log" : "linear", exponentformat: "power" },
  };
  const fixed = range(chart);
  if (fixed) layout.yaxis.range = fixed;
  const options = { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]] };
  Plotly.react(plot, traces(chart, Number($("smooth").value)), layout, options);
  if (plot.clickable) return;
  plot.clickable = true;
  plot.on("plotly_click", (event) => showStep(Math.max(1, Math.round(event.points[0].x))));
}
