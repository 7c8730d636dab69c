// @ts-check
// A page of its own: tables that sort, and downloads of figures and tables.

import { element } from "./dom.js";

/** What a page of its own wants once its module is loaded. */
export function ready(page) {
  const start = () => { sortTables(page); offerDownloads(page); };
  if (page.readyState === "loading") page.addEventListener("DOMContentLoaded", start);
  else start();
}

/** Sort the rows of every table.sortable under `root` when a column's button is pressed. */
export function sortTables(root) {
  for (const table of root.querySelectorAll("table.sortable")) {
    table.tHead.addEventListener("click", (event) => {
      const head = event.target.closest("button")?.closest("th");
      if (head) sortBy(table, head);
    });
  }
}

function sortBy(table, head) {
  const descending = head.getAttribute("aria-sort") === "ascending";
  const column = head.cellIndex;
  const key = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
  const rows = [...table.tBodies[0].rows].map((row) => ({ row, text: key(row), number: parseFloat(key(row)) }));
  const numeric = rows.some((r) => !Number.isNaN(r.number)) && rows.every((r) => r.text === "" || !Number.isNaN(+r.text));
  const compare = numeric ? (a, b) => a.number - b.number : (a, b) => a.text.localeCompare(b.text, "en", { numeric: true });
  const missing = (r) => numeric && Number.isNaN(r.number); // what is missing comes last either way
  rows.sort((a, b) => Number(missing(a)) - Number(missing(b)) || (descending ? compare(b, a) : compare(a, b)));
  table.tBodies[0].append(...rows.map((r) => r.row));
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
}

/** A button below every figure and in the caption of every table, which saves it as SVG or as CSV. */
export function offerDownloads(root) {
  for (const figure of root.querySelectorAll("figure")) {
    const image = figure.querySelector("img[src^='data:image/svg']");
    if (image) figure.append(downloadOf("SVG", image.alt, () => image.src));
  }
  for (const table of root.querySelectorAll("table.sortable")) {
    const name = table.caption.textContent;
    table.caption.append(downloadOf("CSV", name, () => URL.createObjectURL(new Blob([csvOf(table)], { type: "text/csv" }))));
  }
}

function downloadOf(kind, name, address) {
  const button = element("button", { type: "button", class: "download", text: `Save as ${kind}`, "aria-label": `Save as ${kind}: ${name}` });
  button.addEventListener("click", () => {
    const file = name.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60).replace(/^-|-$/g, "") || "mixlens";
    element("a", { href: address(), download: `${file}.${kind.toLowerCase()}` }).click();
  });
  return button;
}

/** The rows of a table as CSV; an interval below a number makes two columns of its own. */
export function csvOf(table) {
  const rows = [...table.rows].map((row) => [...row.cells].map(cellParts));
  const widths = rows[0].map((_, column) => Math.max(...rows.map((row) => row[column].length)));
  const whole = rows.map((row, i) => row.flatMap((parts, column) => Array.from({ length: widths[column] }, (_, part) =>
    parts[part] ?? (i ? "" : `${parts[0]} ${part === 1 ? "low" : "high"}`))));
  return whole.map((row) => row.map(csvCell).join(",")).join("\r\n") + "\r\n";
}

function cellParts(cell) {
  const interval = cell.querySelector("small")?.textContent ?? "";
  const text = (cell.dataset.v ?? cell.textContent).trim();
  const shown = interval ? cell.firstChild.textContent : text;
  return interval ? [shown, ...interval.split(" to ")] : [shown];
}

/** A cell that no spreadsheet takes for a formula. */
export function csvCell(text) {
  const safe = /^[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text)) ? `'${text}` : text;
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}
