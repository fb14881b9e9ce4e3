// Where sequences come from: the page itself, or the server that sent it. A place is a sequence's number in the list.

class Embedded {
  constructor(page) {
    this.page = page;
  }

  async list(split, start, limit) {
    const rows = this.page.sequences.slice(start, start + limit);
    return {
      total: this.page.sequences.length,
      rows: rows.map(({ row, id, positions }, i) => ({ place: start + i, row, id, positions })),
    };
  }

  async open(split, place) {
    return new Opened(this.page.sequences[place], this.page.tokens);
  }

  async placeOfRow(split, row) {
    const place = this.page.sequences.findIndex((each) => each.row === row);
    if (place < 0) throw new Error(`Row ${row} is not on this page.`);
    return place;
  }

  async placeOfId(split, id) {
    const place = this.page.sequences.findIndex((each) => each.id === id);
    if (place < 0) throw new Error("No sequence of this page has this id.");
    return place;
  }
}

class Served {
  async ask(path, parameters) {
    const query = new URLSearchParams(Object.entries(parameters).filter(([, value]) => value !== null));
    let reply;
    try {
      reply = await fetch(`/api/${path}?${query}`);
    } catch {
      throw new Error("The server does not answer; is the command still running?");
    }
    const data = await reply.json();
    if (!reply.ok) throw new Error(data.error);
    return data;
  }

  async list(split, start, limit) {
    const { total, rows } = await this.ask("rows", { split, start, limit });
    return { total, rows: rows.map((each) => ({ place: each.row, ...each })) };
  }

  async open(split, place, start = 0) {
    const { sequence, tokens } = await this.ask("sequence", { split, row: place, start });
    return new Opened(sequence, tokens);
  }

  async placeOfRow(split, row) {
    const { total } = await this.list(split, 0, 0);
    if (total === 0) throw new Error("There are no sequences here.");
    if (row >= total) throw new Error(`There is no row ${row}; the last one is ${total - 1}.`);
    return row;
  }

  async placeOfId(split, id) {
    return (await this.ask("row", { split, id })).row;
  }
}
