// Data of a sequence as the page uses it, and its numbers in words.

const LEVELS = {
  entropy: [0.25, 0.75, 1.5, 2.25, 3, 4, 5],
  surprise: [0.1, 0.5, 1, 2, 4, 6, 9],
};
const STRONGEST = 7;
const OUTSIDE = Infinity; // the surprise of a token that was not among the candidates, whose own is unknown

/** Lists where the data gives one value for all. */
function each(value, length) {
  return Array.isArray(value) ? value : new Array(length).fill(value);
}

/** Shade of a value, 0 to 7; null stays unshaded. */
function level(value, mode) {
  if (value === null) return 0;
  const above = LEVELS[mode].findIndex((limit) => value < limit);
  return above < 0 ? STRONGEST : above;
}

/** One dataset's sequence: T tokens, and the distribution after each. */
class View {
  constructor(data, table) {
    Object.assign(this, data);
    this.table = table;
    this.length = data.tokens.length;
    this.count = each(data.count, this.length);
    this.exact = each(data.exact, this.length);
    this.draws = data.draws === undefined ? null : each(data.draws, this.length);
    this.offsets = new Uint32Array(this.length + 1);
    for (let t = 0; t < this.length; t++) {
      this.offsets[t + 1] = this.offsets[t] + Math.min(this.count[t], this.listed);
    }
    this.texts = data.tokens.map((place) => table.labels[place] + data.after);
    data.at.forEach((t, i) => { this.texts[t] = data.text[i]; });
  }

  label(t) {
    return this.prompt && t === 0 ? this.texts[0] : this.table.labels[this.tokens[t]];
  }

  /** Whether the position before the token has a distribution. */
  expected(t) {
    return t > 0 ? this.count[t - 1] > 0 : this.before;
  }

  /** What the shade of token t stands for: nats, null where there is nothing to say, or OUTSIDE. */
  value(t, mode) {
    if (mode === "entropy") return this.entropy[t];
    if (!this.expected(t)) return null;
    return this.surprise[t] === null ? OUTSIDE : this.surprise[t];
  }

  values(mode) {
    return Array.from({ length: this.length }, (_, t) => this.value(t, mode));
  }

  /** The distribution after token t, as rows of a table. */
  distribution(t) {
    const from = this.offsets[t];
    const following = t + 1 < this.length ? this.tokens[t + 1] : -1;
    const rows = [];
    for (let i = from; i < this.offsets[t + 1]; i++) {
      const place = this.candidates[i];
      rows.push(this.row(t, i - from + 1, place, this.probabilities[i], place === following));
    }
    let apart = 0; // the target, where it has a row of its own
    if (rows.length && following >= 0 && !rows.some((row) => row.next)) {
      const nats = this.surprise[t + 1];
      if (nats !== null) {
        apart = Math.exp(-nats);
        rows.push(this.row(t, this.rank[t + 1], following, apart, true));
      }
    }
    const last = this.last(t, rows, apart);
    return last ? [...rows, last] : rows;
  }

  row(t, rank, place, p, next) {
    const drawn = this.draws ? `${Math.round(p * this.draws[t])} of ${this.draws[t]}` : "";
    return { rank, label: this.table.labels[place], id: this.table.ids[place], p, next, drawn };
  }

  /** Everything that has no row: the tail and the candidates that are not listed, where that is known. */
  last(t, rows, apart) {
    if (rows.length === 0) return null;
    if (this.rest[t] !== null) return { else: "everything else", p: Math.max(0, this.rest[t] - apart) };
    const inside = this.rank[t + 1] > this.listed && this.rank[t + 1] <= this.count[t] ? 1 : 0;
    const unlisted = this.count[t] - Math.min(this.count[t], this.listed) - inside;
    if (unlisted === 0 || this.more === undefined) return null;
    const p = Math.max(0, this.more[t] - (inside ? apart : 0));
    return { else: `${number(unlisted)} more ${unlisted === 1 ? "candidate" : "candidates"}`, p };
  }

  /** How uncertain the teacher is about what comes after token t. */
  uncertainty(t) {
    const value = this.entropy[t];
    if (this.count[t] === 0) return "no distribution is stored after this token";
    if (value === null) return "entropy unknown";
    if (this.exact[t]) return `entropy ${nats(value)}`;
    if (this.kind === "draws") return `entropy of the draws ${nats(value)}`;
    if (this.kind === "candidates") return `entropy among the candidates ${nats(value)}`;
    return `entropy at least ${nats(value)}`;
  }

  /** How expected token t was before it came. */
  surprised(t, start) {
    if (!this.expected(t)) {
      return start + t === 0 ? "nothing stands before it" : "no distribution is stored before it";
    }
    const rank = this.rank[t] ? `rank ${number(this.rank[t])}` : "";
    if (this.surprise[t] === null) return [rank, "outside the candidates, probability unknown"].filter(Boolean).join(", ");
    const p = percent(Math.exp(-this.surprise[t]));
    return [rank, p, `surprise ${nats(this.surprise[t])}`].filter(Boolean).join(", ");
  }

  /** What has to be known to read the numbers after token t. */
  caveats(t) {
    const said = [];
    const following = t + 1 < this.length;
    const listed = this.distribution(t);
    if (this.count[t] && following && !listed.some((row) => row.next)) {
      const rank = this.rank[t + 1];
      said.push(`The next token is not among the ${number(this.count[t])} candidates${rank ? `; its rank is ${number(rank)}` : ""}.`);
    }
    if (this.kind === "candidates") said.push("Only ratios are known: the candidates are shown as if they were all there is.");
    if (this.kind === "draws" && this.count[t]) said.push(`Sampled: shares of ${number(this.draws[t])} draws.`);
    return said;
  }
}

/** Positions of a sequence in one or two datasets. */
class Opened {
  constructor(sequence, table) {
    this.row = sequence.row;
    this.id = sequence.id;
    this.positions = sequence.positions;
    this.start = sequence.start;
    this.problem = "";
    this.views = [];
    for (const data of sequence.views) {
      if (data.problem) this.problem = data.problem;
      else this.views.push(new View(data, table));
    }
    this.length = this.views[0].length;
  }
}

/** Finds text across tokens; letters' case and the kinds of white space make no difference. */
class Finder {
  constructor(texts) {
    const plain = texts.map(Finder.plain);
    this.starts = new Uint32Array(plain.length + 1);
    plain.forEach((text, i) => { this.starts[i + 1] = this.starts[i] + text.length; });
    this.text = plain.join("");
  }

  static plain(text) {
    return text.toLowerCase().replace(/\s/gu, " ");
  }

  /** [first token, last token] of every match. */
  find(query) {
    const wanted = Finder.plain(query);
    const matches = [];
    if (wanted === "") return matches;
    for (let at = this.text.indexOf(wanted); at >= 0; at = this.text.indexOf(wanted, at + wanted.length)) {
      matches.push([this.token(at), this.token(at + wanted.length - 1)]);
    }
    return matches;
  }

  token(offset) {
    let low = 0;
    let high = this.starts.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (this.starts[middle] <= offset) low = middle;
      else high = middle;
    }
    return low;
  }
}

function number(value) {
  return value.toLocaleString("en-US");
}

function nats(value) {
  return `${value < 10 ? value.toFixed(2) : value.toFixed(1)} nats`;
}

function percent(p) {
  const value = 100 * Math.min(1, p);
  if (value >= 10) return `${value.toFixed(1)} %`;
  if (value >= 0.1) return `${value.toFixed(2)} %`;
  return value < 0.001 ? "< 0.001 %" : `${value.toFixed(3)} %`;
}
