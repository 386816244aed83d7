"""The style sheet of the HTML report: one for light and dark, for screen and paper.

Colour never speaks alone: what failed also carries a cross, what did not run a dash.
"""

from __future__ import annotations

_LIGHT = """\
  --page: #f6f7f9; --card: #ffffff; --ink: #1a1f26; --muted: #5c6672; --line: #dce1e7;
  --passed: #1a7f4b; --failed: #c0271b; --not-run: #77808b;
  --s0: #eef4fb; --s1: #cfe1f3; --s2: #9fc3e6; --s3: #5f9bd1; --s4: #2b6cab; --on-dark: #ffffff;
  --c0: #2566a8; --c1: #b4551b; --c2: #2c7a4b; --c3: #7a4ca0; --c4: #8a6a00; --c5: #0b7983;"""
_DARK = """\
  --page: #12151a; --card: #1a1f26; --ink: #e7ebf0; --muted: #9aa5b1; --line: #313944;
  --passed: #4fc07f; --failed: #ff6f61; --not-run: #8b95a1;
  --s0: #202b38; --s1: #24425f; --s2: #2c6090; --s3: #4487c3; --s4: #8dbfec; --on-dark: #0d1116;
  --c0: #6aaeee; --c1: #f0995a; --c2: #6cc78f; --c3: #bd93e6; --c4: #d9b440; --c5: #4fc4cf;"""
_RULES = """\
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 0 0 4px; }
p { margin: 0 0 12px; }
.muted, caption, figcaption { color: var(--muted); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 16px 18px; margin: 16px 0; overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 16px 0 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 14px; }
.tile b { display: block; font-size: 24px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: 13px; }
.passed { color: var(--passed); } .failed { color: var(--failed); }
.not-run { color: var(--not-run); }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th { text-align: left; color: var(--muted); font-weight: 600;
  border-bottom: 1px solid var(--line); }
th, td { padding: 5px 12px 5px 0; vertical-align: top; }
td { border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.why { overflow-wrap: anywhere; min-width: 220px; }
code { font: 12.5px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: 600; }
details > table { margin-top: 10px; }
figure { margin: 0 0 8px; } figcaption { font-size: 13px; margin-bottom: 6px; }
svg { display: block; max-width: 100%; height: auto; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  fill: var(--ink); }
svg .quiet { fill: var(--muted); }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
svg .grid { stroke: var(--line); stroke-width: 1; fill: none; }
svg .mark { stroke: var(--ink); stroke-width: 1.25; stroke-dasharray: 4 3; }
svg .s0 { fill: var(--s0); } svg .s1 { fill: var(--s1); } svg .s2 { fill: var(--s2); }
svg .s3 { fill: var(--s3); } svg .s4 { fill: var(--s4); }
svg .beyond { fill: var(--failed); }
svg .carried { fill: var(--failed); fill-opacity: .3; }
svg .absent { fill: none; stroke: var(--line); }
svg .cross { stroke: var(--on-dark); stroke-width: 2; fill: none; stroke-linecap: round; }
svg .tick { stroke: var(--passed); stroke-width: 2; fill: none; stroke-linecap: round; }
svg .dash { stroke: var(--not-run); stroke-width: 2; stroke-linecap: round; }
svg .dot { fill: var(--c0); fill-opacity: .55; stroke: var(--card); stroke-width: .75; }
svg .dot.out { fill: var(--failed); fill-opacity: 1; }
svg .step { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .c0 { stroke: var(--c0); } svg .c1 { stroke: var(--c1); } svg .c2 { stroke: var(--c2); }
svg .c3 { stroke: var(--c3); } svg .c4 { stroke: var(--c4); } svg .c5 { stroke: var(--c5); }
@media print { body { background: #fff; } section, .tile { break-inside: avoid; } }"""

STYLE = f"""\
:root {{ color-scheme: light dark;
{_LIGHT}
}}
@media (prefers-color-scheme: dark) {{ :root {{
{_DARK}
}} }}
{_RULES}
"""
