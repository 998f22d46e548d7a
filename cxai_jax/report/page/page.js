(() => {
  const pairs = [...document.querySelectorAll(".pair")];
  const sliders = [];
  const fade = (value) => {
    pairs.concat([...document.querySelectorAll("dialog .pair")]).forEach((pair) => {
      const over = pair.querySelector(".over");
      if (over.querySelector(".base")) return;
      const base = pair.querySelector("img").cloneNode();
      base.className = "base";
      base.alt = "";
      over.prepend(base);
    });
    document.documentElement.style.setProperty("--fade", value / 100);
    sliders.forEach((slider) => { slider.value = value; });
  };
  const listen = (slider) => {
    sliders.push(slider);
    slider.addEventListener("input", () => fade(slider.value));
  };
  const label = document.getElementById("fade");
  if (label) {
    label.hidden = false;
    listen(label.querySelector("input"));
  }
  if (!pairs.length) return;
  const dialog = document.createElement("dialog");
  const place = document.createElement("div");
  const text = document.createElement("p");
  const form = document.createElement("form");
  form.method = "dialog";
  const close = document.createElement("button");
  close.textContent = "Close";
  form.append(close);
  if (label) {
    const again = label.cloneNode(true);
    again.removeAttribute("id");
    form.prepend(again);
    listen(again.querySelector("input"));
  }
  dialog.append(place, text, form);
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  document.body.append(dialog);
  const enlarge = (pair) => {
    const copy = pair.cloneNode(true);
    copy.removeAttribute("role");
    copy.removeAttribute("tabindex");
    place.replaceChildren(copy);
    text.textContent = pair.querySelector("img").alt;
    if (pair.dataset.link) {
      const link = document.createElement("a");
      link.href = pair.dataset.link;
      link.textContent = "full size";
      text.append(" ", link);
    }
    dialog.showModal();
  };
  pairs.forEach((pair) => {
    pair.tabIndex = 0;
    pair.setAttribute("role", "button");
    pair.setAttribute("aria-label", "Enlarge " + pair.querySelector("img").alt);
    pair.addEventListener("click", () => enlarge(pair));
    pair.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      enlarge(pair);
    });
  });
})();
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
