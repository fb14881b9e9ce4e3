// The running text of one dataset: a list box with an option for each token.

const BLOCK = 512; // tokens that are laid out together; a line's end ends a block sooner
const BLOCK_LEAST = 128;
const UNSEEN = /^[\p{Cf}\p{Cc}]*$/u; // text that would take no room

class TextPane {
  constructor(place, { onSelect, onHover, onKey }) {
    this.place = place;
    this.tokens = [];
    this.selected = 0;
    this.hits = [];
    this.pointer = [NaN, NaN];
    place.addEventListener("click", (event) => this.at(event, onSelect));
    place.addEventListener("pointermove", (event) => this.moved(event, onHover));
    place.addEventListener("pointerleave", () => onHover(null));
    place.addEventListener("keydown", (event) => onKey(event, this));
  }

  at(event, say) {
    const option = event.target.closest("[role=option]");
    if (option) say(option.position);
  }

  moved(event, say) {
    if (event.pointerType !== "mouse") return;
    const [x, y] = this.pointer;
    this.pointer = [event.clientX, event.clientY];
    if (x === event.clientX && y === event.clientY) return; // the text moved, not the pointer
    const option = event.target.closest("[role=option]");
    say(option ? option.position : null);
  }

  show(view, name) {
    this.tokens = new Array(view.length);
    this.hits = [];
    const fragment = document.createDocumentFragment();
    let block = null;
    let inside = 0;
    for (let t = 0; t < view.length; t++) {
      if (block === null || inside >= BLOCK || (inside >= BLOCK_LEAST && view.texts[t - 1].endsWith("\n"))) {
        block = document.createElement("div");
        block.setAttribute("role", "presentation");
        fragment.append(block);
        inside = 0;
      }
      this.tokens[t] = this.token(view, t);
      block.append(this.tokens[t]);
      inside += 1;
    }
    this.place.classList.toggle("long", view.length > 2 * BLOCK);
    this.place.setAttribute("aria-label", name);
    this.place.removeAttribute("aria-activedescendant");
    this.place.replaceChildren(fragment);
    this.place.scrollTop = 0;
  }

  clear() {
    this.tokens = [];
    this.hits = [];
    this.place.removeAttribute("aria-activedescendant");
    this.place.replaceChildren();
  }

  token(view, t) {
    const option = document.createElement("span");
    const surprise = view.value(t, "surprise");
    const outside = surprise === OUTSIDE ? " outside" : "";
    option.className = `t e${level(view.entropy[t], "entropy")} s${level(surprise, "surprise")}${outside}`;
    option.id = `${this.place.id}-${t}`;
    option.setAttribute("role", "option");
    option.position = t;
    fill(option, view, t);
    return option;
  }

  select(t, following) {
    for (const [position, name] of [[this.selected, "selected"], [this.following, "following"]]) {
      this.tokens[position]?.classList.remove(name);
    }
    this.tokens[this.selected]?.removeAttribute("aria-selected");
    this.selected = t;
    this.following = following;
    const option = this.tokens[t];
    if (!option) {
      this.place.removeAttribute("aria-activedescendant");
      return;
    }
    option.classList.add("selected");
    option.setAttribute("aria-selected", "true");
    this.tokens[following]?.classList.add("following");
    this.place.setAttribute("aria-activedescendant", option.id);
  }

  /** Scroll to the selected token; once more when the text around it has been laid out. */
  reveal() {
    const scroll = () => this.tokens[this.selected]?.scrollIntoView({ block: "nearest" });
    scroll();
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(scroll);
  }

  /** Mark the tokens of matches; `now` is the match that the reader is at. */
  mark(matches, now) {
    for (const t of this.hits) this.tokens[t]?.classList.remove("hit", "now");
    this.hits = [];
    matches.forEach(([first, last], i) => {
      for (let t = first; t <= last; t++) {
        this.tokens[t].classList.add("hit");
        if (i === now) this.tokens[t].classList.add("now");
        this.hits.push(t);
      }
    });
  }

  /** The token of the line above (-1) or below (1) that stands closest. */
  line(step) {
    const box = (t) => this.tokens[t].getClientRects()[0] ?? this.tokens[t].getBoundingClientRect();
    const from = box(this.selected);
    const middle = (from.left + from.right) / 2;
    const beyond = (here) => (step > 0 ? here.top > from.top + from.height / 2 : here.top < from.top - from.height / 2);
    let best = null;
    let line = null;
    for (let t = this.selected + step; t >= 0 && t < this.tokens.length; t += step) {
      const here = box(t);
      if (!beyond(here)) continue;
      line ??= here;
      if (Math.abs(here.top - line.top) > line.height / 2) break;
      const apart = Math.max(here.left - middle, middle - here.right, 0);
      if (best === null || apart < best.apart) best = { t, apart };
    }
    return best === null ? this.selected : best.t;
  }
}

/** Put the text of a token where it stands; line ends, tabs and what takes no room get a sign. */
function fill(option, view, t) {
  const text = view.texts[t];
  if (UNSEEN.test(text.replace(/[\n\t]/gu, "x"))) {
    sign(option, "▫");
    option.setAttribute("aria-label", `${view.label(t)}, no text of its own`);
    option.title = view.label(t);
    option.classList.add("empty");
  } else if (/[\n\t]/u.test(text)) {
    option.setAttribute("aria-label", view.label(t));
    for (const part of text.split(/([\n\t])/u)) {
      if (part === "\n") sign(option, "↵");
      if (part === "\t") sign(option, "⇥");
      option.append(part);
    }
  } else {
    option.textContent = text;
  }
}

function sign(parent, text) {
  const element = document.createElement("span");
  element.className = "sign";
  element.setAttribute("aria-hidden", "true");
  element.textContent = text;
  parent.append(element);
}
