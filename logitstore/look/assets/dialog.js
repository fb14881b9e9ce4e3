// The list of sequences, by pages.

const LISTED = 50;

class Chooser {
  constructor(source, splits, { onChoose }) {
    this.source = source;
    this.start = 0;
    this.here = null;
    this.onChoose = onChoose;
    this.dialog = document.getElementById("chooser");
    this.problem = document.getElementById("chooser-problem");
    this.split = document.getElementById("split");
    this.splits(splits);
    this.listen();
  }

  get chosenSplit() {
    return this.split.value || null;
  }

  splits(splits) {
    document.getElementById("split-field").hidden = splits.length < 2;
    const all = splits.reduce((sum, each) => sum + each.sequences, 0);
    this.split.append(new Option(`all (${number(all)})`, ""));
    for (const { name, sequences } of splits) this.split.append(new Option(`${name} (${number(sequences)})`, name));
  }

  listen() {
    const on = (id, act) => document.getElementById(id).addEventListener("click", () => this.attempt(act));
    on("chooser-close", async () => this.dialog.close());
    on("earlier-rows", () => this.list(Math.max(0, this.start - LISTED)));
    on("later-rows", () => this.list(this.start + LISTED));
    on("go", () => this.go());
    for (const id of ["to-row", "to-id"]) {
      document.getElementById(id).addEventListener("keydown", (event) => {
        if (event.key === "Enter") this.attempt(() => this.go());
      });
    }
    this.split.addEventListener("change", () => this.attempt(() => this.list(0)));
    document.getElementById("rows").addEventListener("click", (event) => {
      const chosen = event.target.closest("button");
      if (chosen) this.choose(chosen.place);
    });
  }

  async attempt(act) {
    this.problem.textContent = "";
    try {
      await act();
    } catch (error) {
      this.problem.textContent = error.message;
    }
  }

  /** Show the list in which the page's sequence is. */
  open(split, here) {
    this.here = { split, place: here };
    this.split.value = split ?? "";
    this.dialog.showModal();
    this.attempt(() => this.list(Math.max(0, here - (here % LISTED))));
  }

  choose(place) {
    this.dialog.close();
    this.onChoose(this.chosenSplit, place);
  }

  async go() {
    const [row, id] = ["to-row", "to-id"].map((name) => document.getElementById(name).value);
    if (row.trim()) {
      if (!/^\d{1,15}$/u.test(row.trim())) throw new Error("A row is a number from 0.");
      this.choose(await this.source.placeOfRow(this.chosenSplit, Number(row)));
    } else if (id === "") {
      throw new Error("Give a row or an id.");
    } else {
      this.choose(await this.source.placeOfId(this.chosenSplit, id));
    }
  }

  async list(start) {
    const split = this.chosenSplit;
    const { total, rows } = await this.source.list(split, start, LISTED);
    if (split !== this.chosenSplit) return; // another one was chosen meanwhile
    this.start = start;
    const made = rows.map((each) => {
      const button = element("button", "", element("span", "row", `row ${number(each.row)}`));
      button.append(element("bdi", "id", each.id || "(empty id)"), element("span", "size", `${number(each.positions)} positions`));
      button.type = "button";
      button.title = each.id;
      button.place = each.place;
      if (each.place === this.here.place && split === this.here.split) button.setAttribute("aria-current", "true");
      return element("li", "", button);
    });
    document.getElementById("rows").replaceChildren(...made);
    document.getElementById("rows-shown").textContent = total
      ? `${number(start + 1)} to ${number(start + rows.length)} of ${number(total)}` : "no sequences";
    document.getElementById("earlier-rows").disabled = start === 0;
    document.getElementById("later-rows").disabled = start + rows.length >= total;
  }
}
