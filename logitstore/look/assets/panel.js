// The distribution after one token: a table with bars, one for each dataset.

const CONTEXT = 40; // characters

function element(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

/** A token by itself: isolated, and with the spaces at its ends shown. */
function chip(label) {
  const [, before, inner, after] = /^( *)(.*?)( *)$/su.exec(label);
  const made = element("bdi", "chip");
  const spaces = (run) => {
    if (run) made.append(element("span", "space", run.length > 3 ? `␣×${run.length}` : "␣".repeat(run.length)));
  };
  spaces(before);
  made.append(label === "" ? "(empty)" : inner);
  spaces(after);
  return made;
}

function sentence(...parts) {
  return element("p", "", ...parts);
}

/** Token t and some text before it, for the panel's heading. */
function context(view, t) {
  let text = "";
  let at = t;
  while (at >= 0 && text.length < CONTEXT) text = view.texts[at--] + text;
  const characters = Array.from(text.replace(/\s+/gu, " ").trimStart());
  if (characters.length > 2 * CONTEXT) return `…${characters.slice(-2 * CONTEXT).join("")}`;
  return `${at >= 0 ? "…" : ""}${characters.join("")}`;
}

class Panel {
  constructor(place) {
    this.place = place;
  }

  /** Show the distribution after token t of every dataset; `passing`: under the pointer, not selected. */
  show(opened, names, t, passing) {
    const [view] = opened.views;
    this.place.replaceChildren(this.heading(opened, view, t, passing), this.columns(opened, names, t));
  }

  nothing(text) {
    const title = element("h2", "", "Nothing to show");
    title.id = "panel-title";
    this.place.replaceChildren(title, sentence(text));
  }

  heading(opened, view, t, passing) {
    const title = element("h2", "", "After ", element("q", "", element("bdi", "", context(view, t))));
    title.id = "panel-title";
    const about = element("p", "about-token", `position ${number(opened.start + t)} of ${number(opened.positions)} · token `);
    about.append(chip(view.prompt && t === 0 ? `<id ${view.table.ids[view.tokens[0]]}>` : view.label(t)));
    about.append(` · id ${view.table.ids[view.tokens[t]]}${passing ? " · under the pointer" : ""}`);
    const head = element("div", "head", title, about);
    if (view.prompt && t === 0) head.append(sentence("This token stands for the prompt, whose own tokens are not stored."));
    return head;
  }

  columns(opened, names, t) {
    const columns = element("div", "columns");
    const tables = opened.views.map((view) => view.distribution(t));
    const listed = tables.flat().filter((row) => !row.else);
    const largest = listed.reduce((most, row) => Math.max(most, row.p), 1e-9); // one scale for both
    opened.views.forEach((view, i) => {
      const column = element("section", `column column-${i}`);
      if (names.length > 1) column.append(element("h3", "", element("bdi", "", names[i])));
      column.setAttribute("aria-label", names[i]);
      column.append(this.facts(view, opened.start, t));
      if (tables[i].length) column.append(this.table(tables[i], largest, view));
      for (const text of view.caveats(t)) column.append(element("p", "caveat", text));
      columns.append(column);
    });
    if (opened.problem) columns.append(element("section", "column", element("p", "caveat", opened.problem)));
    return columns;
  }

  facts(view, start, t) {
    const facts = element("dl", "facts");
    facts.append(element("dt", "", "Next token"), element("dd", "", view.uncertainty(t)));
    facts.append(element("dt", "", "This token"), element("dd", "", view.surprised(t, start)));
    return facts;
  }

  table(rows, largest, view) {
    const table = element("table", view.draws ? "drawn" : "");
    table.append(element("caption", "hidden", "Most likely next tokens"));
    const head = element("tr", "");
    for (const [text, shown] of [["Rank", "#"], ["Token", "next token"], ["Probability", "probability"]]) {
      const cell = element("th", "", element("span", "", shown));
      cell.scope = "col";
      cell.setAttribute("aria-label", text);
      head.append(cell);
    }
    const body = element("tbody", "");
    for (const row of rows) body.append(this.row(row, largest, view));
    table.append(element("thead", "", head), body);
    return table;
  }

  row(row, largest, view) {
    const line = element("tr", row.next ? "next" : row.else ? "else" : "");
    const words = element("div", "", row.else ?? chip(row.label));
    if (row.next) words.append(" ", element("span", "mark", "comes next"));
    const name = element("td", "token", words);
    name.title = row.else ?? `${row.label}  id ${row.id}`;
    const track = element("span", "track");
    if (!row.else) { // many tokens together: beside their bar, those of single ones would be short
      const bar = element("span", "bar");
      bar.style.width = `${(100 * Math.min(1, row.p / largest)).toFixed(2)}%`;
      track.append(bar);
    }
    track.setAttribute("aria-hidden", "true");
    const value = element("span", "value", view.draws && row.drawn ? `${percent(row.p)} (${row.drawn})` : percent(row.p));
    line.append(element("td", "rank", element("span", "", row.rank ? number(row.rank) : "")), name, element("td", "probability", track, value));
    return line;
  }
}

/** The same for a screen reader, short. */
function spoken(opened, names, t) {
  const said = [`${opened.views[0].label(t)}, position ${opened.start + t}`];
  opened.views.forEach((view, i) => {
    const best = view.distribution(t).filter((row) => !row.else).slice(0, 3);
    const listed = best.map((row) => `${row.label.trim() || row.label} ${percent(row.p)}${row.next ? ", comes next" : ""}`);
    const name = names.length > 1 ? `${names[i]}: ` : "";
    said.push(`${name}${view.uncertainty(t)}${listed.length ? `; likely next: ${listed.join("; ")}` : ""}`);
  });
  return `${said.join(". ")}.`;
}
