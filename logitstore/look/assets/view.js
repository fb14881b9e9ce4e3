// The page: what is selected, and everything that follows from it.

const STEP = 50; // tokens of a page up or down
const MEANING = {
  entropy: "How uncertain the teacher is about what comes after a token, in nats.",
  surprise: "How unexpected a token was before it came: −log of its probability, in nats.",
};
const TITLE = { entropy: "Entropy", surprise: "Surprise" };
const LOW = { // windows in which not everything has room: the page scrolls
  one: "(max-height: 620px), (max-width: 820px) and (max-height: 720px)",
  two: "(max-height: 820px)",
};
const THEMES = ["auto", "light", "dark"];

const byId = (id) => document.getElementById(id);

class Page {
  constructor(data) {
    this.names = data.datasets.map((each) => each.name);
    this.served = data.served;
    this.window = data.window;
    this.source = data.served ? new Served() : new Embedded(data);
    this.totals = new Map([[null, data.served ? data.datasets[0].sequences : data.sequences.length]]);
    for (const { name, sequences } of data.splits) this.totals.set(name, sequences);
    this.notes = data.notes;
    LEVELS.entropy = data.shades;
    this.mode = "entropy";
    this.place = 0;
    this.split = null;
    this.remark = "";
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
      onChoose: (split, place) => this.choose(split, place),
    });
    document.body.classList.toggle("both", this.names.length > 1);
    this.head(data);
    this.theme(remembered("theme") ?? "auto");
    this.listen();
    this.shade(this.mode);
  }

  get total() {
    return this.totals.get(this.split);
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
    on("current", () => this.chooser.open(this.split, this.place));
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
    addEventListener("hashchange", () => this.follow());
    const low = matchMedia(this.names.length > 1 ? LOW.two : LOW.one);
    document.body.classList.toggle("low", low.matches);
    low.addEventListener("change", () => document.body.classList.toggle("low", low.matches));
    addEventListener("resize", () => this.reveal());
  }

  /** Show a sequence; of one that is too long for one page, the part of a position. */
  async open(place, { position = null, remark = "", quiet = false } = {}) {
    const ticket = ++this.asked;
    this.place = place; // at once: whoever asks for the next one meanwhile means the one after this
    this.remark = remark;
    clearTimeout(this.timer);
    this.buttons();
    document.body.setAttribute("aria-busy", "true");
    try {
      const start = this.served && position !== null ? position - (position % this.window) : 0;
      const opened = await this.source.open(this.split, place, start);
      if (ticket === this.asked) this.show(opened, position === null ? null : position - opened.start, quiet);
    } catch (error) {
      if (ticket === this.asked) this.failed(error, place);
    } finally {
      if (ticket === this.asked) document.body.removeAttribute("aria-busy");
    }
  }

  /** Go to a sequence that was chosen from the list of a split. */
  choose(split, place) {
    this.split = split;
    this.panes[0].place.focus();
    this.open(place);
  }

  show(opened, position, quiet) {
    this.opened = opened;
    this.hovered = null;
    const [first, second] = opened.views;
    const name = `Text of sequence ${opened.id}, ${number(opened.length)} tokens`;
    this.panes[0].show(first, this.names.length > 1 ? `${this.names[0]}: ${name}` : name);
    if (this.panes[1] && second) this.panes[1].show(second, `${this.names[1]}: ${name}`);
    else this.panes[1]?.clear();
    this.finder = new Finder(first.texts);
    this.order = null;
    const id = opened.id || "(empty id)";
    const row = `row ${number(opened.row)}`;
    byId("current").replaceChildren(element("span", "row", row), element("bdi", "id", id));
    byId("current").setAttribute("aria-label", `Choose a sequence; ${row}, id ${id}`);
    const what = `Find text in this ${opened.length < opened.positions ? "part" : "sequence"}`;
    byId("query-label").textContent = what;
    byId("query").placeholder = opened.length < opened.positions ? "Find in this part" : "Find text";
    this.buttons();
    this.notices();
    this.draw();
    const scored = first.count.findIndex((count) => count > 0);
    this.select(position ?? Math.max(0, scored), { quiet: true, reveal: position !== null });
    this.search({ keep: true });
    if (!quiet) this.say(`Sequence in ${row}, id ${id}, ${number(opened.positions)} positions. `);
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
    byId("chart-value").textContent = "";
    byId("current").textContent = `row ${number(place)}`;
    byId("current").setAttribute("aria-label", `Choose a sequence; row ${number(place)}`);
    byId("notice").replaceChildren(element("p", "problem", error.message));
    this.address(place);
    this.buttons();
    this.search({ keep: true });
  }

  notices() {
    const { start, length, positions, problem } = this.opened;
    const empty = length === 0 ? "This sequence has no positions." : "";
    const said = [this.remark, problem, empty, ...this.notes].filter(Boolean).map((text) => element("p", "", text));
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
      made.addEventListener("click", () => this.part(from));
      return made;
    };
    const made = [];
    if (start > 0) made.push(button("‹ Part before", Math.max(0, start - this.window)));
    if (start + length < positions) made.push(button("Part after ›", start + length));
    return made;
  }

  /** Another part of the sequence, at one of its positions; the reader goes on in the text. */
  part(position, pane = this.panes[0]) {
    pane.place.focus();
    this.open(this.place, { position });
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
    const of = this.opened.views.map((view) => (this.mode === "entropy" ? view.entropyOf() : ""));
    const same = new Set(of).size === 1;
    const exact = (text) => text || "exact";
    const unit = `(${["nats", same ? of[0] : of.map(exact).join(" / ")].filter(Boolean).join(", ")})`;
    byId("chart-title").replaceChildren(TITLE[this.mode], element("span", "along", " along the sequence"), ` ${unit}`);
    byId("meaning").textContent = same && of[0] ? MEANING[this.mode].replace(/\.$/u, ` (${of[0]}).`) : MEANING[this.mode];
    if (!same) byId("meaning").append(` ${of.map((text, i) => `${this.names[i]}: ${exact(text)}.`).join(" ")}`);
    this.chart.show(series, this.opened.start, `${TITLE[this.mode]} along the sequence ${unit}. ${words.join(". ")}`);
    const keys = series.length > 1 ? this.names : [];
    byId("chart-legend").replaceChildren(...keys.map((name, i) => {
      const words = element("span", "", element("bdi", "", name), same ? "" : ` ${exact(of[i])}`);
      return element("span", `key key-${i}`, words);
    }));
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
      this.selected = 0;
      this.panel.nothing("The sequence is empty.");
      byId("chart-value").textContent = "";
      return;
    }
    this.selected = Math.max(0, Math.min(length - 1, t));
    for (const pane of this.panes) pane.select(this.selected, this.selected + 1);
    this.chart.select(this.selected);
    this.describe(this.selected, false); // the panel takes its room first
    if (reveal) this.reveal();
    if (!quiet) this.say();
  }

  /** Scroll to the selected token; in the pane of the reader last, since the page may scroll too. */
  reveal() {
    const last = (pane) => (pane.place === document.activeElement ? 1 : 0);
    for (const pane of [...this.panes].reverse().sort((a, b) => last(a) - last(b))) pane.reveal();
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
  say(before = "") {
    if (before) this.address();
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      if (!this.opened) return;
      byId("said").textContent = before + (this.opened.length ? spoken(this.opened, this.names, this.selected) : "It is empty.");
      this.address();
    }, 200);
  }

  /** Put the place into the address, which leads here again. */
  address(row = this.opened.row) {
    const parts = { ...(this.split === null ? {} : { split: this.split }), row };
    if (this.opened?.length) parts.position = this.opened.start + this.selected;
    history.replaceState(null, "", `#${new URLSearchParams(Object.entries(parts))}`);
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
    const { start, length, positions } = this.opened;
    if (this.served && event.key === "ArrowRight" && this.selected === length - 1 && start + length < positions) {
      this.part(start + length, pane);
    } else if (this.served && event.key === "ArrowLeft" && this.selected === 0 && start > 0) {
      this.part(start - 1, pane);
    } else {
      this.select(to(), { reveal: true });
    }
  }

  anywhere(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target !== document.body && !event.target.closest(".text")) return; // elsewhere letters are typed
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
    await this.follow({ quiet: true });
  }

  /** Go where the address says; where it leads nowhere, that is said. */
  async follow({ quiet = false } = {}) {
    const asked = new URLSearchParams(location.hash.slice(1));
    const [row, position] = ["row", "position"].map((name) => (/^\d{1,15}$/u.test(asked.get(name) ?? "") ? Number(asked.get(name)) : null));
    if (row === null) {
      if (!this.opened) await this.open(0, { quiet });
      return;
    }
    const split = this.served ? asked.get("split") : null;
    try {
      const place = await this.source.placeOfRow(split, row);
      this.split = split;
      await this.open(place, { position, quiet });
    } catch (error) {
      const here = this.opened?.length ? this.opened.start + this.selected : null;
      await this.open(this.place, { position: here, remark: error.message, quiet });
    }
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
