"""The report's fixed parts: its style, light and dark, and the small script that pages and sorts the table."""

from __future__ import annotations

from typing import Final

STYLE: Final = """
:root { color-scheme: light dark; --ink: #1c2430; --dim: #5b6675; --paper: #ffffff; --card: #f5f7fa; --rule: #d9dfe7;
  --bad: #b42318; --good: #137a4b; --c0: #1f6feb; --c1: #d9730d; --c2: #0f8a6d; --c3: #8250df; --c4: #bf3989;
  --c5: #57606a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf2; --dim: #9aa7b8; --paper: #10151c; --card: #18202a;
  --rule: #2c3744; --bad: #ff8a80; --good: #5fd39a; --c0: #6cb0ff; --c1: #ffad66; --c2: #5fd3b5; --c3: #c4a1ff;
  --c4: #ff94c8; --c5: #aab4c0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 86rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
p, li { max-width: 75rem; } .dim, figcaption { color: var(--dim); }
.banner { padding: .7rem 1rem; border-radius: .4rem; border: 1px solid; margin: .6rem 0; }
.void { color: var(--bad); } .warning { color: var(--dim); } .kept { color: var(--good); } .broken { color:
  var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(11.5rem, 1fr)); gap: .7rem; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--dim); font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(30rem, 100%), 1fr)); gap: 1rem; }
.chart { margin: 0; background: var(--card); border: 1px solid var(--rule); border-radius: .5rem; padding: .6rem; }
.chart svg { width: 100%; height: auto; display: block; } .none { padding: 3rem; text-align: center; color:
  var(--dim); }
svg text { fill: var(--dim); font: 11px system-ui, sans-serif; } svg text.limit { fill: var(--bad); }
.grid { stroke: var(--rule); stroke-width: 1; } .limit { stroke: var(--bad); stroke-dasharray: 5 4; }
svg text.limit { stroke: none; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.keys { float: right; } .key { margin-left: .9rem; font-size: .85rem; }
.key::before { content: ""; display: inline-block; width: .8rem; height: .2rem; margin: 0 .35rem .25rem 0;
  background: currentColor; }
.line.c0 { stroke: var(--c0) } .line.c1 { stroke: var(--c1) } .line.c2 { stroke: var(--c2) } .line.c3 { stroke:
  var(--c3) }
.line.c4 { stroke: var(--c4) } .line.c5 { stroke: var(--c5) } .key.c0 { color: var(--c0) } .key.c1 { color:
  var(--c1) }
.key.c2 { color: var(--c2) } .key.c3 { color: var(--c3) } .key.c4 { color: var(--c4) } .key.c5 { color: var(--c5) }
.mark.c0 { fill: var(--c0) } .mark.c1 { fill: var(--c1) } .mark.c2 { fill: var(--c2) } .mark.c3 { fill: var(--c3) }
.mark.c4 { fill: var(--c4) } .mark.c5 { fill: var(--c5) }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
td span.dim { display: block; font-size: .8rem; }
th:first-child, td:first-child { text-align: left; } th { color: var(--dim); font-weight: 600; }
#requests th { cursor: pointer; } tr.failed td { color: var(--bad); }
button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--rule); border-radius: .4rem;
  padding: .25rem .8rem; cursor: pointer; }
input { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--rule); border-radius: .4rem;
  padding: .2rem .5rem; }
dt { font-weight: 600; } dd { margin: 0 0 .4rem; color: var(--dim); } pre { white-space: pre-wrap;
  overflow-wrap: anywhere; }
"""

SCRIPT: Final = """
const data = JSON.parse(document.getElementById("data").textContent);
const body = document.querySelector("#requests tbody"), place = document.getElementById("place");
const only = document.getElementById("only");
const size = 50; let rows = data, page = 0, column = 0, up = true;
function draw() {
  const pages = Math.max(1, Math.ceil(rows.length / size));
  page = Math.min(Math.max(page, 0), pages - 1);
  body.replaceChildren(...rows.slice(page * size, (page + 1) * size).map(row => {
    const line = document.createElement("tr");
    if (row[9]) line.className = "failed";
    for (const cell of row) line.insertCell().textContent = cell === null ? "" : cell;
    return line;
  }));
  place.textContent = `${rows.length} requests, page ${page + 1} of ${pages}`;
}
function order() {
  const worst = up ? Infinity : -Infinity, sign = up ? 1 : -1;
  rows = data.filter(row => !only.checked || row[9]);
  rows.sort((a, b) => {
    const x = a[column] === null ? worst : a[column], y = b[column] === null ? worst : b[column];
    return x < y ? -sign : x > y ? sign : 0;
  });
  page = 0; draw();
}
document.querySelectorAll("#requests th").forEach((head, index) => head.addEventListener("click", () => {
  up = column === index ? !up : true; column = index; order();
}));
document.getElementById("back").addEventListener("click", () => { page -= 1; draw(); });
document.getElementById("on").addEventListener("click", () => { page += 1; draw(); });
only.addEventListener("change", order);
draw();
"""
