// The page: what is selected, and everything that follows from it.

const STEP = 50; // tokens of a page up or down
const MEANING = {
  entropy: "How uncertain the teacher is about what comes after a token, in nats.",
  surprise: "How unexpected a token was before it came: −log of its probability, in nats.",
};
const TITLE = { entropy: "Entropy along the sequence (nats)", surprise: "Surprise along the sequence (nats)" };
const THEMES = ["auto", "light", "dark"];

const byId = (id) => document.getElementById(id);

class Page {
  constructor(data) {
    this.names = data.datasets.map((each) => each.name);
    this.served = data.served;
    this.window = data.window;
    this.source = data.served ? new Served() : new Embedded(data);
    this.total = data.served ? data.datasets[0].sequences : data.sequences.length;
    this.mode = "entropy";
    this.place = 0;
    this.split = null;
    this.asked = 0;
    this.matches = [];
    this.match = -1;
    this.panel = new Panel(byId("panel"));
    this.chart = new Chart(byId("chart"), {
      onSelect: (t) => this.select(t, { reveal: true }),
      onHover: (t) => this.hover(t),
    });
    this.panes = this.names.map((name, i) => this.pane(name, i));
    this.chooser = new Chooser(this.source, data.served ? data.splits : [], {
      onChoose: (split, place, total) => this.choose(split, place, total),
    });
    document.body.classList.toggle("both", this.names.length > 1);
    this.head(data);
    this.theme(remembered("theme") ?? "auto");
    this.listen();
    this.shade(this.mode);
  }

  head(data) {
    byId("name").textContent = this.names.join("  and  ");
    const teachers = data.datasets.map((each) => each.teacher ?? "unknown teacher").join(" and ");
    const shown = data.served ? "" : `, ${number(this.total)} on this page`;
    const { sequences } = data.datasets[0];
    byId("about").textContent = `${teachers} · ${number(sequences)} ${sequences === 1 ? "sequence" : "sequences"}${shown}`;
    byId("name").title = byId("name").textContent;
  }

  pane(name, i) {
    const column = element("div", "pane");
    if (this.names.length > 1) column.append(element("h3", `name-${i}`, element("bdi", "", name)));
    const place = element("div", "text");
    place.id = `text-${i}`;
    place.tabIndex = 0;
    place.setAttribute("role", "listbox");
    place.setAttribute("aria-orientation", "horizontal");
    column.append(place);
    byId("panes").append(column);
    const pane = new TextPane(place, {
      onSelect: (t) => this.select(t),
      onHover: (t) => this.hover(t),
      onKey: (event, from) => this.key(event, from),
    });
    place.addEventListener("scroll", () => this.scrolled(pane), { passive: true });
    return pane;
  }

  /** Panes of equal width break the same lines: they scroll together. */
  scrolled(pane) {
    for (const other of this.panes) {
      if (other !== pane && other.place.clientWidth === pane.place.clientWidth) {
        if (Math.abs(other.place.scrollTop - pane.place.scrollTop) > 1) other.place.scrollTop = pane.place.scrollTop;
      }
    }
  }

  listen() {
    const on = (id, act) => byId(id).addEventListener("click", act);
    on("previous", () => this.open(this.place - 1));
    on("next", () => this.open(this.place + 1));
    on("current", () => this.chooser.open(this.place));
    on("theme", () => this.theme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]));
    on("skip", () => this.panes[0].place.focus());
    on("earlier-match", () => this.go(-1));
    on("later-match", () => this.go(1));
    byId("query").addEventListener("input", () => this.search());
    byId("query").addEventListener("keydown", (event) => this.searchKey(event));
    for (const radio of document.getElementsByName("shade")) {
      radio.addEventListener("change", () => this.shade(radio.value));
    }
    document.addEventListener("keydown", (event) => this.anywhere(event));
  }

  /** Show a sequence, from one of its positions on where it is long. */
  async open(place, { start = 0, position = null } = {}) {
    const ticket = ++this.asked;
    this.place = place; // at once: whoever asks for the next one meanwhile means the one after this
    this.buttons();
    document.body.setAttribute("aria-busy", "true");
    try {
      const opened = await this.source.open(this.split, place, start);
      if (ticket === this.asked) this.show(opened, position);
    } catch (error) {
      if (ticket === this.asked) this.failed(error, place);
    } finally {
      if (ticket === this.asked) document.body.removeAttribute("aria-busy");
    }
  }

  /** Go to a sequence that was chosen from the list of a split. */
  choose(split, place, total) {
    this.split = split;
    this.total = total;
    this.open(place);
  }

  show(opened, position) {
    this.opened = opened;
    this.hovered = null;
    const [first, second] = opened.views;
    const name = `Text of sequence ${opened.id}, ${number(opened.length)} tokens`;
    this.panes[0].show(first, this.names.length > 1 ? `${this.names[0]}: ${name}` : name);
    if (this.panes[1] && second) this.panes[1].show(second, `${this.names[1]}: ${name}`);
    else this.panes[1]?.clear();
    this.finder = new Finder(first.texts);
    this.order = null;
    byId("current").replaceChildren(
      element("span", "row", `row ${number(opened.row)}`), element("bdi", "id", opened.id || "(empty id)"));
    this.buttons();
    this.notices();
    this.draw();
    const scored = first.count.findIndex((count) => count > 0);
    this.select(position ?? Math.max(0, scored), { quiet: true, reveal: position !== null });
    this.search({ keep: true });
  }

  buttons() {
    byId("previous").disabled = this.place <= 0;
    byId("next").disabled = this.place >= this.total - 1;
  }

  /** A sequence that cannot be read: the others still can. */
  failed(error, place) {
    this.opened = null;
    this.finder = null;
    for (const pane of this.panes) pane.clear();
    this.chart.clear();
    this.panel.nothing("This sequence cannot be shown.");
    byId("current").textContent = `row ${number(place)}`;
    byId("notice").replaceChildren(element("p", "problem", error.message));
    this.buttons();
    this.search({ keep: true });
  }

  notices() {
    const said = [];
    const { start, length, positions, problem } = this.opened;
    if (problem) said.push(element("p", "", problem));
    if (length === 0) said.push(element("p", "", "This sequence has no positions."));
    if (length < positions && length) {
      const part = element("p", "", `Positions ${number(start)} to ${number(start + length - 1)} of ${number(positions)} are shown. `);
      if (this.served) part.append(...this.parts());
      said.push(part);
    }
    byId("notice").replaceChildren(...said);
  }

  /** Buttons to the parts before and after, of a sequence that is too long for one page. */
  parts() {
    const { start, length, positions } = this.opened;
    const button = (text, from) => {
      const made = element("button", "", text);
      made.type = "button";
      made.addEventListener("click", () => this.open(this.place, { start: from }));
      return made;
    };
    const made = [];
    if (start > 0) made.push(button("‹ Part before", Math.max(0, start - this.window)));
    if (start + length < positions) made.push(button("Part after ›", start + length));
    return made;
  }

  shade(mode) {
    this.mode = mode;
    document.documentElement.dataset.shade = mode;
    byId("meaning").textContent = MEANING[mode];
    byId("chart-title").textContent = TITLE[mode];
    const steps = [0, ...LEVELS[mode]].map((limit, i) => {
      const text = i === STRONGEST ? `${limit}+` : `${limit}`;
      const step = element("li", `t e${i} s${i}`, text);
      step.setAttribute("aria-label", i === STRONGEST ? `${limit} nats and more` : `from ${limit} nats`);
      return step;
    });
    if (mode === "surprise") steps.push(element("li", `t s${STRONGEST} outside`, "outside the candidates"));
    byId("scale").replaceChildren(...steps);
    if (this.opened) this.draw();
  }

  draw() {
    const series = this.opened.views.map((view) => view.values(this.mode));
    const words = series.map((values, i) => `${this.names[i]}: ${this.summary(values)}`);
    this.chart.show(series, this.opened.start, `${TITLE[this.mode]}. ${words.join(". ")}`);
    const keys = series.length > 1 ? this.names : [];
    byId("chart-legend").replaceChildren(...keys.map((name, i) => element("span", `key key-${i}`, element("bdi", "", name))));
  }

  summary(values) {
    const known = values.filter(Number.isFinite);
    if (!known.length) return "no values";
    const largest = known.reduce((most, value) => Math.max(most, value), 0);
    const mean = known.reduce((sum, value) => sum + value, 0) / known.length;
    return `mean ${nats(mean)}, largest ${nats(largest)} at position ${this.opened.start + values.indexOf(largest)}`;
  }

  select(t, { quiet = false, reveal = false } = {}) {
    const { length } = this.opened;
    if (length === 0) {
      this.panel.nothing("The sequence is empty.");
      return;
    }
    this.selected = Math.max(0, Math.min(length - 1, t));
    for (const pane of this.panes) {
      pane.select(this.selected, this.selected + 1);
      if (reveal) pane.reveal();
    }
    this.chart.select(this.selected);
    this.describe(this.selected, false);
    if (!quiet) this.say();
  }

  describe(t, passing) {
    this.panel.show(this.opened, this.names, t, passing);
    const values = this.opened.views.map((view) => view.value(t, this.mode));
    const text = values.map((value) => (Number.isFinite(value) ? nats(value) : "–")).join(" and ");
    byId("chart-value").textContent = `${number(this.opened.start + t)}: ${text}`;
  }

  /** The token under the pointer shows its distribution for as long. */
  hover(t) {
    if (!this.opened?.length || this.hovered === t) return;
    this.hovered = t;
    this.chart.hover(t);
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => {
      if (this.opened?.length) this.describe(t ?? this.selected, t !== null && t !== this.selected);
    });
  }

  /** Tell a screen reader, and put the place into the address, once the reader rests. */
  say() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      if (!this.opened) return;
      byId("said").textContent = spoken(this.opened, this.names, this.selected);
      history.replaceState(null, "", `#row=${this.opened.row}&position=${this.opened.start + this.selected}`);
    }, 200);
  }

  key(event, pane) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.opened?.length) return;
    const to = {
      ArrowLeft: () => this.selected - 1,
      ArrowRight: () => this.selected + 1,
      ArrowUp: () => pane.line(-1),
      ArrowDown: () => pane.line(1),
      Home: () => 0,
      End: () => this.opened.length - 1,
      PageUp: () => this.selected - STEP,
      PageDown: () => this.selected + STEP,
    }[event.key];
    if (!to) return;
    event.preventDefault();
    this.select(to(), { reveal: true });
  }

  anywhere(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (byId("chooser").open || event.target.closest("input:not([type=radio]), select")) return;
    const act = {
      "/": () => { byId("query").focus(); byId("query").select(); },
      "[": () => { if (this.place > 0) this.open(this.place - 1); },
      "]": () => { if (this.place < this.total - 1) this.open(this.place + 1); },
      u: () => this.uncertain(1),
      U: () => this.uncertain(-1),
    }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }

  /** From the most uncertain token to the next in that order. */
  uncertain(step) {
    if (!this.opened?.length) return;
    const { entropy } = this.opened.views[0];
    const known = (t) => entropy[t] ?? -1;
    this.order ??= Array.from(entropy.keys()).sort((a, b) => known(b) - known(a) || a - b);
    this.turn = this.order[this.turn] === this.selected ? this.turn + step : 0;
    this.turn = (this.turn + this.order.length) % this.order.length;
    this.select(this.order[this.turn], { reveal: true });
  }

  search({ keep = false } = {}) {
    this.matches = this.finder ? this.finder.find(byId("query").value) : [];
    this.match = -1;
    if (this.matches.length && !keep) this.go(1);
    else this.marked();
  }

  go(step) {
    if (!this.matches.length) return;
    const next = this.match < 0 ? (step > 0 ? 0 : -1) : this.match + step;
    this.match = (next + this.matches.length) % this.matches.length;
    this.marked();
    this.select(this.matches[this.match][1], { reveal: true });
  }

  marked() {
    for (const pane of this.panes) if (pane.tokens.length) pane.mark(this.matches, this.match);
    const { length } = this.matches;
    const at = this.match < 0 ? `${number(length)} found` : `${number(this.match + 1)} of ${number(length)}`;
    byId("matches").textContent = byId("query").value === "" ? "" : length ? at : "none";
    for (const id of ["earlier-match", "later-match"]) byId(id).disabled = length === 0;
  }

  searchKey(event) {
    if (event.key === "Enter") {
      event.preventDefault();
      this.go(event.shiftKey ? -1 : 1);
    } else if (event.key === "Escape") {
      event.preventDefault();
      this.panes[0].place.focus();
    }
  }

  theme(name) {
    const known = THEMES.includes(name) ? name : "auto";
    document.documentElement.dataset.theme = known;
    byId("theme").textContent = { auto: "◐ Auto", light: "○ Light", dark: "● Dark" }[known];
    byId("theme").setAttribute("aria-label", `Theme: ${known}`);
    remember("theme", known);
  }

  /** Begin where the address says. */
  async start() {
    if (this.total === 0) {
      this.panel.nothing("There are no sequences.");
      byId("current").textContent = "no sequences";
      this.buttons();
      return;
    }
    const asked = new URLSearchParams(location.hash.slice(1));
    const [row, position] = ["row", "position"].map((name) => (/^\d{1,15}$/u.test(asked.get(name) ?? "") ? Number(asked.get(name)) : null));
    const place = row === null ? null : await this.source.placeOfRow(null, row).catch(() => null);
    if (place === null || position === null) {
      await this.open(place ?? 0);
      return;
    }
    const start = this.served ? position - (position % this.window) : 0;
    await this.open(place, { start, position: position - start });
  }
}

/** Storage is refused to some pages opened from a file: then nothing is remembered. */
function remembered(key) {
  try {
    return localStorage.getItem(`logitstore-${key}`);
  } catch {
    return null;
  }
}

function remember(key, value) {
  try {
    localStorage.setItem(`logitstore-${key}`, value);
  } catch {
    // nothing depends on it
  }
}

new Page(JSON.parse(byId("data").textContent)).start();
