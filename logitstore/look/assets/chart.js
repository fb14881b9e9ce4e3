// The chart along the sequence: one line a dataset; where there are more positions than pixels, also the range in each.

const SVG = "http://www.w3.org/2000/svg";
const HALF_DIGIT = 3.5; // pixels
const MARGIN = { left: 30, right: 8, top: 8, bottom: 18 };

function svg(name, attributes, parent) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (parent) parent.append(element);
  return element;
}

class Chart {
  constructor(place, { onSelect, onHover }) {
    this.place = place;
    this.series = [];
    this.length = 0;
    this.selected = 0;
    new ResizeObserver(() => this.draw()).observe(place);
    const at = (event) => this.position(event.clientX - place.getBoundingClientRect().left);
    place.addEventListener("pointermove", (event) => { if (this.length) onHover(at(event)); });
    place.addEventListener("pointerleave", () => onHover(null));
    place.addEventListener("click", (event) => { if (this.length) onSelect(at(event)); });
  }

  /** Lists of nats by position, null where there is none; `summary` says in words what the lines show. */
  show(series, start, summary) {
    this.series = series;
    this.length = series[0].length;
    this.start = start;
    this.summary = summary;
    this.draw();
  }

  clear() {
    this.length = 0;
    this.series = [];
    this.place.replaceChildren();
  }

  select(t) {
    this.selected = t;
    this.move(this.cursor, t);
  }

  hover(t) {
    this.move(this.hair, t);
  }

  move(line, t) {
    if (!line) return;
    line.setAttribute("visibility", t === null || !this.length ? "hidden" : "visible");
    if (t !== null) line.setAttribute("transform", `translate(${this.x(t)} 0)`);
  }

  x(t) {
    return MARGIN.left + (this.length > 1 ? (t / (this.length - 1)) * this.inner : 0);
  }

  y(value) {
    return MARGIN.top + (1 - Math.min(1, value / this.top)) * this.high;
  }

  position(x) {
    const t = Math.round(((x - MARGIN.left) / this.inner) * (this.length - 1));
    return Math.max(0, Math.min(this.length - 1, t));
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.place;
    this.inner = width - MARGIN.left - MARGIN.right;
    this.high = height - MARGIN.top - MARGIN.bottom;
    if (this.inner < 20 || this.high < 20 || !this.series.length) return;
    this.top = Math.max(1, Math.ceil(this.series.flat().reduce((most, v) => (Number.isFinite(v) && v > most ? v : most), 0)));
    const root = svg("svg", { width, height, role: "img", "aria-label": this.summary ?? "" });
    this.axes(root, width, height);
    this.series.forEach((values, i) => this.line(root, values, i));
    const tall = { y1: MARGIN.top, y2: height - MARGIN.bottom, visibility: "hidden" };
    this.hair = svg("line", { class: "hair", ...tall }, root);
    this.cursor = svg("line", { class: "cursor", ...tall }, root);
    this.place.replaceChildren(root);
    this.select(this.selected);
  }

  axes(root, width, height) {
    for (const value of [0, this.top / 2, this.top]) {
      const y = this.y(value);
      svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y }, root);
      svg("text", { class: "tick", x: MARGIN.left - 6, y: y + 4, "text-anchor": "end" }, root).textContent = value;
    }
    const step = niceStep((this.length - 1) / Math.max(2, width / 110));
    for (let t = 0; t < this.length; t += step) {
      const text = number(this.start + t);
      if (t > 0 && this.x(t) + text.length * HALF_DIGIT > width) break;
      const anchor = t === 0 ? "start" : "middle";
      svg("text", { class: "tick", x: this.x(t), y: height - 3, "text-anchor": anchor }, root).textContent = text;
    }
  }

  line(root, values, i) {
    const columns = Math.floor(this.inner);
    if (values.length <= columns) {
      svg("path", { class: `line line-${i}`, d: this.path(values, (t) => this.x(t)) }, root);
      return;
    }
    const { low, mean, high } = ranges(values, columns);
    const at = (column) => MARGIN.left + column + 0.5;
    svg("path", { class: `band band-${i}`, d: this.band(low, high, at) }, root);
    svg("path", { class: `line line-${i}`, d: this.path(mean, at) }, root);
  }

  path(values, at) {
    let d = "";
    let pen = false;
    values.forEach((value, t) => {
      const known = Number.isFinite(value);
      if (known) d += `${pen ? "L" : "M"}${at(t).toFixed(1)} ${this.y(value).toFixed(1)}${pen ? "" : "h0"}`;
      pen = known;
    });
    return d;
  }

  band(low, high, at) {
    let d = "";
    low.forEach((value, column) => {
      if (value !== null) d += `M${at(column).toFixed(1)} ${this.y(value).toFixed(1)}V${this.y(high[column]).toFixed(1)}`;
    });
    return d;
  }
}

/** Least, mean and largest value of each column of pixels. */
function ranges(values, columns) {
  const low = new Array(columns).fill(null);
  const mean = new Array(columns).fill(null);
  const high = new Array(columns).fill(null);
  for (let column = 0; column < columns; column++) {
    const end = Math.floor(((column + 1) * values.length) / columns);
    let [sum, known] = [0, 0];
    for (let t = Math.floor((column * values.length) / columns); t < end; t++) {
      const value = values[t];
      if (!Number.isFinite(value)) continue;
      sum += value;
      known += 1;
      low[column] = known === 1 ? value : Math.min(low[column], value);
      high[column] = known === 1 ? value : Math.max(high[column], value);
    }
    if (known) mean[column] = sum / known;
  }
  return { low, mean, high };
}

/** 1, 2 or 5 times a power of ten, at least the given step. */
function niceStep(least) {
  const power = 10 ** Math.floor(Math.log10(Math.max(1, least)));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= least) ?? 1;
}
