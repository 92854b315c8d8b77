// Sort a table by the column whose heading is clicked; again for the other direction.
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const up = heading.getAttribute("aria-sort") !== "ascending";
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => row.cells[column].textContent.trim();
      const sign = up ? 1 : -1;
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        const [p, q] = [parseFloat(x), parseFloat(y)];
        const numbers = !Number.isNaN(p) && !Number.isNaN(q);
        return sign * (numbers ? p - q : x.localeCompare(y, "en", { numeric: true }));
      });
      body.append(...rows);
    });
  });
}
// What is folded on screen is printed, but for pages of options: the command says those that were given.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not(.options)")) details.open = true;
});
