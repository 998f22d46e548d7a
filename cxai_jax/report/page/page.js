(() => {
  const table = document.getElementById("images");
  if (!table) return;
  const body = table.tBodies[0], rows = [...body.rows];
  const search = document.getElementById("search");
  const show = document.getElementById("show");
  const words = rows.map((row) => row.textContent.toLowerCase());
  const tags = rows.map((row) => row.dataset.tags.split(" "));
  const filter = () => {
    const text = search.value.toLowerCase();
    let shown = 0;
    rows.forEach((row, i) => {
      const keep = words[i].includes(text) &&
        (!show.value || tags[i].includes(show.value));
      row.hidden = !keep;
      shown += keep;
    });
    document.getElementById("count").textContent =
      shown + " of " + rows.length + " images";
  };
  const value = (row, column) => {
    const cell = row.cells[column];
    return "v" in cell.dataset ? Number(cell.dataset.v) : cell.textContent;
  };
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    if (heading.textContent === "Picture") return;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    button.addEventListener("click", () => {
      const up = heading.getAttribute("aria-sort") !== "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const order = new Intl.Collator(undefined, { numeric: true }).compare;
      const compare = (a, b) =>
        typeof a[0] === "number" && typeof b[0] === "number"
          ? a[0] - b[0] : order(a[0], b[0]);
      const keyed = rows.map((row) => [value(row, column), row]).sort(compare);
      if (!up) keyed.reverse();
      body.append(...keyed.map((pair) => pair[1]));
    });
    heading.replaceChildren(button);
  });
  search.addEventListener("input", filter);
  show.addEventListener("change", filter);
  document.getElementById("controls").hidden = false;
  filter();
})();
