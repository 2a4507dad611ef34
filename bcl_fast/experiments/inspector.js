// The step inspectors of a page: one batch's competition, for every layer that has one. inspector.py defines the data.
"use strict";
(() => {
  const MATRICES = ["affinity", "weighted_affinity", "rescue_pull", "rank_score", "local_novelty", "gradient_mask"];
  const VECTORS = ["weight", "winner_target", "rescue_target", "som_target"];
  // In the order of the page; a strip stands beside the map whose rows it goes with.
  const COMPETITION = [
    ["rank_score", "How clearly a feature beats its neighbors on a sample. Orange: the sample's winner."],
    ["image_coverage", "Sum of rank_score over features."],
    ["local_novelty", "Small where a feature's neighbors score on the sample too."],
    ["gradient_mask", "A feature's share of the loss gradient; by default rank_score itself."],
  ];
  const RESCUE = [
    ["affinity", "How much a sample is a feature's own, whoever wins it."],
    ["image_need", "High where few claim it."],
    ["weighted_affinity", "Affinity, weighted by need: who could rescue whom."],
    ["rescue_pull", "The few samples that pull a feature, with their weights."],
  ];
  const STRIPS = { image_coverage: "coverage", image_need: "need" }; // map -> key of its values [b]
  const NUMBERS = {
    win_rate: "win rate (mean rank_score)", novelty: "novelty", som_strength: "strength of its pull (som_strength)",
    nearest: "cosine with its most similar feature", gradient: "gradient, norm", pull: "pull, norm",
    adam: "optimizer's move, norm",
  };
  const METRICS = {
    alive: "alive", dead: "dead", redundant: "redundant", wt_sim: "weights alike (wt_sim)",
    tgt_sim: "rescue targets alike (tgt_sim)",
  };
  const HEIGHT = { row: 3.4, least: 64, most: 330 }; // of a map, in CSS pixels
  const SVG = "http://www.w3.org/2000/svg";

  // --- Small tools ---------------------------------------------------------------------------------------------------

  function make(tag, attributes = {}, ...children) {
    const svg = ["svg", "rect", "path", "circle", "line", "text"].includes(tag);
    const element = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  function number(value) {
    if (value === null || value === undefined) return "not finite";
    const size = Math.abs(value);
    const text = size > 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(1) : String(+value.toPrecision(3));
    return text.replace("-", "\u2212");
  }

  const count = (value) => value.toLocaleString("en-US");
  function shown(some, all, what) {
    if (all === 1) return `the only ${what.replace(/s$/, "")}`;
    return `${some === all ? "all" : `${count(some)} of`} ${count(all)} ${what}`;
  }

  // 256 colors between some; their lightness falls, or falls to either side, so that no color vision is needed.
  function ramp(...stops) {
    return Array.from({ length: 256 }, (_, level) => {
      const place = (level / 255) * (stops.length - 1);
      const left = Math.min(Math.floor(place), stops.length - 2);
      return stops[left].map((from, i) => Math.round(from + (place - left) * (stops[left + 1][i] - from)));
    });
  }
  const SEQUENTIAL = ramp([255, 255, 255], [150, 200, 232], [0, 114, 178], [8, 30, 60]);
  const SIGNED = ramp([0, 60, 110], [0, 114, 178], [255, 255, 255], [213, 94, 0], [120, 40, 0]);
  const GRAY = ramp([0, 0, 0], [255, 255, 255]);

  // One pixel a value: CSS makes it larger.
  function fill(canvas, width, height, color) {
    canvas.width = width;
    canvas.height = height;
    const image = new ImageData(width, height);
    for (let i = 0; i < width * height; i++) image.data.set([...color(i), 255], 4 * i);
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  async function inflate(text) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  // Replaces the packed bytes of a step by its arrays: `levels` of NAME, row after row.
  async function unpack(data, step) {
    const bytes = await inflate(step.packed);
    const [b, d] = [step.samples.length, data.features.length];
    let place = 0;
    const take = (size) => bytes.subarray(place, (place += size));
    step.levels = Object.fromEntries(MATRICES.map((name) => [name, take(b * d)]));
    if (data.length !== null) {
      for (const name of VECTORS) step.levels[name] = take(d * data.length);
      step.levels.inputs = take(step.chosen.length * data.length);
    }
    delete step.packed;
  }

  // --- Values of a step ----------------------------------------------------------------------------------------------

  function valuesOf(step, name) {
    if (name in STRIPS) return step[STRIPS[name]];
    const [low, high] = step.range[name];
    return Array.from(step.levels[name], (level) => between(low, high, level / 255));
  }

  // Halves and shares, since the difference of two numbers may be none.
  const between = (low, high, share) => low * (1 - share) + high * share;

  function rangeOf(steps, name) {
    const ends = steps.flatMap((step) => (name in STRIPS ? step[STRIPS[name]] : step.range[name]));
    const finite = ends.filter((value) => value !== null);
    return finite.length ? [Math.min(...finite), Math.max(...finite)] : [0, 0];
  }

  const levelOf = (value, [low, high]) =>
    high > low ? Math.round(((value / 2 - low / 2) / (high / 2 - low / 2)) * 255) : 0;

  // --- Parts of the page ---------------------------------------------------------------------------------------------

  // The canvas of a map, what is drawn over it, its scale, and what it says of the chosen cell.
  function mapOf(name, text, onCell) {
    const canvas = make("canvas", { role: "img" });
    const over = make("svg", { preserveAspectRatio: "none", "aria-hidden": "true" });
    const bar = make("canvas", { "aria-hidden": "true" });
    const [low, high] = [make("span"), make("span")];
    const cell = make("p", { class: "cell" });
    const alike = make("p", { class: "alike" });
    fill(bar, 256, 1, (i) => SEQUENTIAL[i]);
    const stage = make("div", { class: "stage" }, canvas, over);
    const caption = make("figcaption", {}, make("code", {}, name), make("span", {}, text));
    const kind = name in STRIPS ? "strip" : "map";
    const scale = make("div", { class: "scale" }, low, bar, high);
    const figure = make("figure", { class: kind, "data-name": name }, caption, stage, scale, cell, alike);
    stage.addEventListener("click", (event) => {
      const box = canvas.getBoundingClientRect();
      const at = (from, size, cells) => Math.max(0, Math.min(cells - 1, Math.floor((from / size) * cells)));
      const column = at(event.clientX - box.left, box.width, canvas.width);
      onCell(kind === "map" ? column : null, at(event.clientY - box.top, box.height, canvas.height));
    });
    return { name, figure, canvas, over, low, high, cell, alike, stage };
  }

  function drawMap(map, data, step, range, at) {
    const strip = map.name in STRIPS;
    const [b, d] = [step.samples.length, strip ? 1 : data.features.length];
    const values = valuesOf(step, map.name);
    fill(map.canvas, d, b, (i) => SEQUENTIAL[values[i] === null ? 0 : levelOf(values[i], range)]);
    map.stage.style.height = `${Math.max(HEIGHT.least, Math.min(HEIGHT.most, HEIGHT.row * b))}px`;
    [map.low.textContent, map.high.textContent] = range.map(number);
    const here = values[at.row * d + (strip ? 0 : at.column)];
    const size = strip ? `${b} samples` : `${b} samples by ${d} features`;
    const where = `sample ${step.samples[at.row]}` + (strip ? "" : `, feature ${data.features[at.column]}`);
    map.cell.textContent = `${where[0].toUpperCase()}${where.slice(1)}: ${number(here)}`;
    const words = `${map.name}, ${size}, from ${number(range[0])} to ${number(range[1])}; at ${where}: ${number(here)}`;
    map.canvas.setAttribute("aria-label", words);
    if (!strip) {
      const [cosine, correlation] = step.alike[map.name];
      map.alike.textContent = `Columns alike: cosine ${number(cosine)}, correlation ${number(correlation)}`;
    }
    map.over.setAttribute("viewBox", `0 0 ${d} ${b}`);
    const marks = map.name === "rank_score" ? winners(data, step) : [];
    const row = make("rect", { class: "chosen", x: 0, y: at.row, width: d, height: 1 });
    const column = make("rect", { class: "chosen", x: at.column, y: 0, width: 1, height: b });
    map.over.replaceChildren(...marks, row, ...(strip ? [] : [column]));
  }

  function winners(data, step) {
    const marks = [];
    step.winner.forEach((feature, row) => {
      const column = data.features.indexOf(feature);
      if (column >= 0) marks.push(make("rect", { class: "won", x: column, y: row, width: 1, height: 1 }));
    });
    return marks;
  }

  // One row of vectors as an image, or as a strip where inputs are no images. Signed: on a scale around 0.
  function drawing(data, step, name, row, label, signed) {
    const n = data.length;
    const levels = step.levels[name].subarray(row * n, (row + 1) * n);
    const [low, high] = VECTORS.includes(name) ? step.range[name][row] : step.range[name];
    const stepOfLevels = high / 255 - low / 255;
    const values = Array.from(levels, (level) => between(low, high, level / 255));
    // Bytes cannot tell less than half a level from 0, which a scale of its own would blow up.
    const most = Math.max(...values.map(Math.abs));
    const largest = most > 0.501 * stepOfLevels ? most : 0;
    const [channels, height, width] = data.shape || [1, 1, n];
    const level = (i) => (signed ? Math.round(((largest ? values[i] / largest : 0) + 1) * 127.5) : levels[i]);
    const colors = signed ? SIGNED : GRAY;
    const size = height * width;
    const color = (i) => (channels === 3 ? [level(i), level(size + i), level(2 * size + i)] : colors[level(i)]);
    const signedScale = largest ? `colors from \u2212${number(largest)} to ${number(largest)}` : "0 everywhere";
    const scale = signed ? signedScale : `${number(low)} (black) to ${number(high)} (white)`;
    const canvas = make("canvas", { role: "img", "aria-label": `${label}; ${scale}` });
    fill(canvas, width, height, color);
    return { canvas, scale };
  }

  const portrait = (data, { canvas }, ...captions) =>
    make("figure", { class: data.shape ? "image" : "vector" }, canvas,
      make("figcaption", {}, ...captions.map((line) => make("span", {}, line))));

  // The win rate of a feature over all measured steps, a circle at the step shown.
  function curveOf(data, step, column) {
    const [width, height, left, right, top, bottom] = [360, 130, 44, 12, 12, 28];
    const steps = data.curve.step;
    const rates = data.curve.win_rate[column];
    const most = Math.max(...rates.filter((rate) => rate !== null), step.win_rate[column] || 0) || 1;
    const [first, last] = [steps[0], steps[steps.length - 1]];
    const x = (at) => left + (width - left - right) * (last > first ? (at - first) / (last - first) : 0.5);
    const y = (rate) => height - bottom - (height - top - bottom) * (rate / most);
    let line = "";
    rates.forEach((rate, i) => {
      const letter = i && rates[i - 1] !== null ? "L" : "M";
      if (rate !== null) line += `${letter}${x(steps[i]).toFixed(1)} ${y(rate).toFixed(1)}`;
    });
    const rate = step.win_rate[column];
    const label = `Win rate of feature ${data.features[column]} over the measured steps ${count(first)} to ` +
      `${count(last)}, at most ${number(most)}; at step ${count(step.step)}: ${number(rate)}`;
    const words = (at, height, text, anchor) => make("text", { x: at, y: height, "text-anchor": anchor }, text);
    const svg = make("svg", { class: "curve", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label },
      make("line", { x1: left, x2: width - right, y1: y(0), y2: y(0) }),
      make("line", { x1: left, x2: width - right, y1: y(most), y2: y(most) }),
      make("line", { class: "now", x1: x(step.step), x2: x(step.step), y1: top, y2: y(0) }),
      make("path", { d: line || "M0 0" }),
      words(left - 5, y(most) + 4, number(most), "end"), words(left - 5, y(0) + 4, "0", "end"),
      words(x(first), height - 8, last > first ? count(first) : "", "start"),
      words(width - right, height - 8, count(last), "end"),
      words((left + width - right) / 2, height - 8, "step", "middle"));
    if (rate !== null) svg.append(make("circle", { cx: x(step.step), cy: y(rate), r: 4.5 }));
    return svg;
  }

  // --- What is said of the chosen feature and sample -----------------------------------------------------------------

  function numbersOf(step, column) {
    const list = make("dl");
    for (const [key, label] of Object.entries(NUMBERS)) {
      if (key in step) list.append(make("dt", {}, label), make("dd", { "data-key": key }, number(step[key][column])));
    }
    return list;
  }

  function featurePart(data, step, column) {
    const feature = data.features[column];
    const won = step.samples.filter((_, row) => step.winner[row] === feature);
    const list = won.length ? `: ${won.join(", ")}.` : ".";
    const wins = make("p", { class: "wins" }, `Wins ${won.length} of the ${step.samples.length} samples shown${list}`);
    const left = make("div", {}, make("h4", {}, `Feature ${feature} at step ${count(step.step)}`),
      numbersOf(step, column), wins, make("p", { class: "over" }, "Its win rate over the measured steps"),
      curveOf(data, step, column));
    const right = make("div");
    if (data.length !== null) {
      const pictures = VECTORS.map((name) => {
        const drawn = drawing(data, step, name, column, `${name} of feature ${feature}`, true);
        return portrait(data, drawn, make("code", {}, name), drawn.scale);
      });
      const bar = make("canvas", { "aria-hidden": "true" });
      fill(bar, 256, 1, (i) => SIGNED[i]);
      const colored = data.shape && data.shape[0] === 3;
      const scale = colored ? "Middle gray is 0." : make("div", { class: "scale" }, "below 0", bar, "above 0");
      const heading = make("h4", {}, "Where it is, and where it is pulled");
      right.append(heading, make("div", { class: "row vectors" }, ...pictures), scale);
    }
    right.append(...rescuePart(data, step, column));
    return make("div", { class: "feature" }, left, right);
  }

  function rescuePart(data, step, column) {
    const rows = step.rescue_rows[column];
    const heading = make("h4", {}, `Samples that rescue it: the ${rows.length} that pull most`);
    const pairs = rows.map((sample, i) => [sample, number(step.rescue_weight[column][i])]);
    if (data.length === null) {
      const items = pairs.map(([sample, weight]) => make("li", {}, `sample ${sample}, weight ${weight}`));
      return [heading, make("ul", { class: "rescue" }, ...items)];
    }
    const pictures = pairs.map(([sample, weight]) => {
      const figure = portrait(data, inputOf(data, step, sample), `sample ${sample}`, `weight ${weight}`);
      figure.dataset.sample = sample;
      return figure;
    });
    const scale = data.shape ? [make("p", { class: "over" }, `Values from ${inputOf(data, step, rows[0]).scale}`)] : [];
    return [heading, make("div", { class: "row rescue" }, ...pictures), ...(rows.length ? scale : [])];
  }

  const inputOf = (data, step, sample) =>
    drawing(data, step, "inputs", step.chosen.indexOf(sample), `sample ${sample}`, !data.shape);

  function samplePart(data, step, row) {
    const sample = step.samples[row];
    const winner = step.winner[row];
    const kept = data.features.includes(winner) ? "" : ", which is not among those shown";
    const [coverage, need] = [number(step.coverage[row]), number(step.need[row])];
    const pulls = step.pulls[row] ? count(step.pulls[row]) : "none";
    const rescues = ` It pulls ${pulls} of the ${count(data.features_of)} features.`;
    const words = make("p", {}, make("b", {}, `Sample ${sample}`),
      `: won by feature ${winner}${kept}; coverage ${coverage}, need ${need}.${rescues}`);
    const there = data.length !== null && step.chosen.includes(sample);
    const picture = there ? [portrait(data, inputOf(data, step, sample))] : [];
    if (data.length !== null && !there) words.append(" Kept are the inputs of samples that pull a feature most.");
    return make("div", { class: "sample row" }, ...picture, words);
  }

  // --- One layer -----------------------------------------------------------------------------------------------------

  function notesOf(data) {
    const { steps } = data;
    const batches = steps.map((step) => step.batch);
    const most = Math.max(...batches);
    const mostShown = Math.max(...steps.map((step) => step.samples.length));
    const parts = [shown(mostShown, most, "samples"), shown(data.features.length, data.features_of, "features")];
    parts.push(shown(steps.length, data.measured, "measured steps"));
    let text = `Shown: ${parts.join(", ")}.`;
    if (Math.min(...batches) < most) text += ` Batches have ${count(Math.min(...batches))} to ${count(most)} samples.`;
    if (data.full_shape && String(data.shape) !== String(data.full_shape)) {
      const [from, to] = [data.full_shape, data.shape].map(([c, h, w]) => `${c} \u00d7 ${h} \u00d7 ${w}`);
      text += ` Images are averaged from ${from} (channels, height, width) to ${to}.`;
    } else if (!data.shape && data.length !== null && data.length < data.inputs) {
      text += ` Of a vector, ${shown(data.length, data.inputs, "inputs")} are drawn.`;
    }
    return data.length === null ? `${text} Vectors of this many inputs are not kept.` : text;
  }

  function controlsOf(data) {
    const slider = make("input", { type: "range", min: 0, max: data.steps.length - 1, step: 1, value: 0 });
    slider.disabled = data.steps.length === 1;
    // No <output>, which would take the label of the slider.
    const [now, feature, sample] = [make("b", { class: "now" }), make("select"), make("select")];
    const same = make("input", { type: "checkbox" });
    feature.append(...data.features.map((_, column) => make("option", { value: column })));
    const bar = make("div", { class: "controls" },
      make("label", { class: "step" }, make("span", {}, "Step ", now), slider),
      make("label", {}, make("span", {}, "Feature"), feature), make("label", {}, make("span", {}, "Sample"), sample),
      make("label", { class: "same" }, same, "the same scales at all steps"));
    return { bar, slider, now, feature, sample, same };
  }

  // The lists say of each step who wins what.
  function fillLists(controls, data, step) {
    [...controls.feature.options].forEach((option, column) => {
      const wins = step.winner.filter((winner) => winner === data.features[column]).length;
      option.textContent = `${data.features[column]} (mean score ${number(step.win_rate[column])}, wins ${wins})`;
    });
    const words = step.samples.map((sample, row) => `${sample} (won by ${step.winner[row]})`);
    controls.sample.replaceChildren(...words.map((text, row) => make("option", { value: row }, text)));
  }

  function start(root, data) {
    const { steps } = data;
    const at = { place: 0, column: 0, row: 0 };
    const controls = controlsOf(data);
    const [metrics, feature, sample] = [make("p", { class: "metrics" }), make("div"), make("div")];
    const choose = (column, row) => update({ column: column === null ? at.column : column, row });
    const mapsOf = (group) => group.map(([name, text]) => mapOf(name, text, choose));
    const [competition, rescue] = [mapsOf(COMPETITION), mapsOf(RESCUE)];
    const maps = [...competition, ...rescue];
    const lasting = Object.fromEntries(maps.map(({ name }) => [name, rangeOf(steps, name)]));
    const grid = (some) => make("div", { class: "maps" }, ...some.map((map) => map.figure));

    function update(change) {
      const sampled = steps[at.place].samples[at.row];
      Object.assign(at, change);
      const step = steps[at.place];
      if ("place" in change) {
        // Batches may differ in size: the same sample, or else the last one before it.
        at.row = step.samples.findLastIndex((one) => one <= sampled);
        fillLists(controls, data, step);
      }
      controls.feature.value = at.column;
      controls.sample.value = at.row;
      const place = steps.length === 1 ? "" : ` (${at.place + 1} of ${steps.length})`;
      controls.now.textContent = `${count(step.step)}${place}`;
      controls.slider.setAttribute("aria-valuetext", `step ${count(step.step)}`);
      const named = Object.entries(METRICS).filter(([key]) => key in step.metrics);
      metrics.textContent = named.map(([key, label]) => `${label}: ${number(step.metrics[key])}`).join("  \u00b7  ");
      for (const map of maps) {
        const range = controls.same.checked ? lasting[map.name] : rangeOf([step], map.name);
        drawMap(map, data, step, range, at);
      }
      root.classList.toggle("broken", MATRICES.some((name) => step.alike[name][0] === null));
      feature.replaceChildren(featurePart(data, step, at.column));
      sample.replaceChildren(samplePart(data, step, at.row));
    }

    controls.slider.addEventListener("input", () => update({ place: +controls.slider.value }));
    controls.feature.addEventListener("change", () => update({ column: +controls.feature.value }));
    controls.sample.addEventListener("change", () => update({ row: +controls.sample.value }));
    controls.same.addEventListener("change", () => update({}));
    const how = "Every map is one batch: a row for each sample, a column for each feature, dark where values are " +
      "high. Click a cell to choose its feature and sample, or choose them in the lists. Samples are numbered within " +
      "their batch, and every step has another batch.";
    const broken = make("p", { class: "warning", role: "status" },
      "This step holds values that are not finite: NaN is shown as the lowest value or 0, Inf as an end of a scale.");
    root.replaceChildren(
      make("p", {}, how), make("p", { class: "shown" }, notesOf(data)), controls.bar, metrics, broken,
      make("h4", {}, "The competition: who wins which sample"), grid(competition),
      make("h4", {}, "The rescue: which samples pull which feature"), grid(rescue), sample, feature);
    update({ place: 0 });
    root.dataset.ready = "";
  }

  for (const root of document.querySelectorAll(".inspector")) {
    const data = JSON.parse(root.querySelector("script").textContent);
    const unpacked = Promise.all(data.steps.map((step) => unpack(data, step)));
    unpacked.then(() => start(root, data)).catch((error) => {
      root.append(`The step inspector could not start here: ${error.message}`);
      throw error;
    });
  }
})();
