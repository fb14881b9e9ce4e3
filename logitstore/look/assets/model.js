// Data of a sequence as the page uses it, and its numbers in words.

const LEVELS = {
  entropy: [], // the data says them
  surprise: [0.1, 0.5, 1, 2, 4, 6, 9],
};
const STRONGEST = 7;
const ENTROPY_OF = { "candidates and tail": "at least", draws: "of the draws", candidates: "among the candidates" };
const IMPOSSIBLE = "its numbers are impossible: see `logitstore validate --deep`";
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
    this.labels = table.labels[data.spelled];
    this.place = each(data.place, data.surprise.length);
    this.rank = data.rank ?? this.place.map((place) => place + 1);
    this.told = each(data.told, data.surprise.length);
    this.impossible = new Set(data.impossible);
    this.draws = data.draws === undefined ? null : each(data.draws, this.length);
    this.offsets = new Uint32Array(this.length + 1);
    for (let t = 0; t < this.length; t++) {
      this.offsets[t + 1] = this.offsets[t] + Math.min(this.count[t], this.listed);
    }
    this.texts = data.tokens.map((place) => this.labels[place] + data.after);
    data.at.forEach((t, i) => { this.texts[t] = data.text[i]; });
  }

  label(t) {
    return this.prompt && t === 0 ? this.texts[0] : this.labels[this.tokens[t]];
  }

  /** The token after token t, as a place in the table; null at the end of the sequence. */
  following(t) {
    return (t + 1 < this.length ? this.tokens[t + 1] : this.next) ?? null;
  }

  /** Whether the position before the token has a distribution. */
  expected(t) {
    return t > 0 ? this.count[t - 1] > 0 && !this.impossible.has(t - 1) : this.before;
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

  /** What the entropies are of, in words; empty where all are those of the whole vocabulary. */
  entropyOf() {
    const known = Array.from(this.entropy.keys()).filter((t) => this.entropy[t] !== null);
    const stored = known.filter((t) => this.exact[t]).length;
    if (stored === known.length) return "";
    return ENTROPY_OF[this.entropy_from] + (stored ? " where not stored" : "");
  }

  /** The distribution after token t, as rows of a table. */
  distribution(t) {
    if (this.impossible.has(t)) return [];
    const from = this.offsets[t];
    const following = this.following(t);
    const rows = [];
    for (let i = from; i < this.offsets[t + 1]; i++) {
      const place = this.candidates[i];
      rows.push(this.row(t, i - from + 1, place, this.probabilities[i], place === following, this.draws));
    }
    if (rows.length === 0) return rows;
    if (following !== null && !rows.some((row) => row.next) && this.surprise[t + 1] !== null) {
      const inside = this.place[t + 1] >= 0;
      const rank = inside ? this.place[t + 1] + 1 : this.rank[t + 1] > this.count[t] ? this.rank[t + 1] : 0;
      rows.push(this.row(t, rank, following, Math.exp(-this.surprise[t + 1]), true, inside && !this.told[t + 1]));
    }
    if (this.rest[t] !== null) rows.push({ else: this.others(t), p: this.rest[t] });
    return rows;
  }

  row(t, rank, place, p, next, isShare) {
    const drawn = this.draws && isShare ? `${Math.round(p * this.draws[t])} of ${this.draws[t]}` : "";
    return { rank, label: this.labels[place], id: this.table.ids[place], p, next, drawn };
  }

  /** What has no row of its own. */
  others(t) {
    if (this.kind === "vocabulary") return "everything else";
    const unlisted = this.count[t] - this.listed - (this.place[t + 1] >= this.listed ? 1 : 0);
    return `${number(unlisted)} more ${unlisted === 1 ? "candidate" : "candidates"}`;
  }

  /** How uncertain the teacher is about what comes after token t. */
  uncertainty(t) {
    const value = this.entropy[t];
    if (this.impossible.has(t)) return IMPOSSIBLE;
    if (this.count[t] === 0) return "no distribution is stored after this token";
    if (value === null) return "entropy unknown";
    return `entropy ${this.exact[t] ? "" : `${ENTROPY_OF[this.entropy_from]} `}${nats(value)}`;
  }

  /** How expected token t was before it came. */
  surprised(t, start) {
    if (this.impossible.has(t - 1)) return "the numbers before it are impossible";
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
    if (this.impossible.has(t)) return said;
    if (this.count[t] && this.following(t) !== null && this.place[t + 1] < 0) {
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
