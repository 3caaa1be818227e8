"""How the page looks: theme, styles, and the one script, for the keys of the Vote tab. Nothing comes from a network."""

from __future__ import annotations

import json
from typing import Any

TITLE = "lora-dpo"

CSS = """
.gradio-container, .gradio-container > .main, .gradio-container .wrap.fillable { width: 100% !important; }
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
.gradio-container .html-container { padding: 0 !important; }
.bar { align-items: flex-end !important; }
.bar button.lg, .bar button.md { min-height: 42px; }
:root, .light { --good: #1f7a4d; --bad: #b3372b; --warn: #8a6100; --line-1: #2f5f94; --line-2: #b3372b;
  --grid: #d9dde3; --soft: #f5f6f8; }
.dark { --good: #5cc795; --bad: #f08a7d; --warn: #e3b341; --line-1: #7fb2ec; --line-2: #f08a7d;
  --grid: #3a3f4a; --soft: #1d212b; }

#head { display: flex; align-items: baseline; gap: 12px; flex-wrap: wrap; padding: 2px 2px 0; }
#head h1 { font-size: 1.35rem; font-weight: 700; margin: 0; }
#head span { color: var(--body-text-color-subdued); font-size: .92rem; }

.note { margin: 2px 2px; font-size: .88rem; line-height: 1.45; color: var(--body-text-color-subdued); min-height: 1.3em;
  overflow-wrap: anywhere; }
.note.good { color: var(--good); }
.note.bad { color: var(--bad); }
.note.wait { font-style: italic; }
.faint { color: var(--body-text-color-subdued); font-style: italic; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; }

.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 12px; }
.card, .samples, .charts figure { border: 1px solid var(--border-color-primary); border-radius: 10px;
  background: var(--block-background-fill); }
.card { min-height: 150px; max-height: 420px; overflow-y: auto; }
.card header { display: flex; gap: 10px; align-items: center; padding: 10px 14px 2px; }
.card .text { padding: 4px 14px 14px; }
.letter { display: inline-grid; place-items: center; width: 26px; height: 26px; border-radius: 50%; font-weight: 700;
  background: var(--primary-500); color: white; font-size: .9rem; }
.card-name { font-size: .88rem; color: var(--body-text-color-subdued); }
.asked { border-left: 3px solid var(--primary-500); padding: 6px 12px; margin: 2px 0; background: var(--soft);
  border-radius: 0 8px 8px 0; max-height: 220px; overflow-y: auto; }
.asked small { color: var(--body-text-color-subdued); display: block; }

.scroll { overflow-x: auto; }
table.plain { border-collapse: collapse; width: 100%; font-size: .9rem; }
.gradio-container table.plain, .gradio-container table.plain :is(thead, tbody, tr, th, td) { border: 0; }
.gradio-container table.plain :is(th, td) { text-align: left; padding: 7px 12px 7px 4px; vertical-align: top;
  border-bottom: 1px solid var(--border-color-primary); }
table.plain th { font-weight: 600; color: var(--body-text-color-subdued); white-space: nowrap; }
.gradio-container table.plain .right { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
table.plain.names td:first-child { font-weight: 600; overflow-wrap: anywhere; min-width: 8em; }
.interval { white-space: nowrap; min-width: 200px; }
.interval .bar { display: inline-block; position: relative; width: 110px; height: 8px; border-radius: 4px;
  background: var(--grid); margin-right: 10px; vertical-align: middle; }
.interval b { position: absolute; top: 0; bottom: 0; border-radius: 4px; background: var(--line-1); opacity: .55; }
.interval i { position: absolute; top: -3px; width: 3px; height: 14px; margin-left: -1px; border-radius: 2px;
  background: var(--line-1); }

dl.facts { display: grid; grid-template-columns: minmax(96px, max-content) 1fr; gap: 5px 16px; margin: 4px 2px;
  font-size: .9rem; }
dl.facts dt { color: var(--body-text-color-subdued); }
dl.facts dd { margin: 0; overflow-wrap: anywhere; }

details.finding { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 8px 12px; margin: 6px 0;
  font-size: .9rem; }
details.finding summary { cursor: pointer; }
details.finding p, details.finding ul { margin: 6px 0 0; }
details.finding li { overflow-wrap: anywhere; color: var(--body-text-color-subdued); }
.badge { display: inline-block; min-width: 62px; text-align: center; font-size: .78rem; font-weight: 600;
  padding: 1px 8px; border-radius: 10px; margin-right: 10px; border: 1px solid currentColor; }
.finding.error .badge { color: var(--bad); }
.finding.warning .badge { color: var(--warn); }

.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(270px, 100%), 1fr)); gap: 12px; }
.charts figure { margin: 0; padding: 10px 10px 4px; min-width: 0; }
.charts figcaption { font-size: .85rem; font-weight: 600; }
.charts svg { width: 100%; height: auto; display: block; }
.charts .tick { font-size: 11px; fill: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.charts .gl { stroke: var(--grid); stroke-width: 1; }
.charts .level { stroke: var(--body-text-color-subdued); stroke-width: 1; stroke-dasharray: 3 3; }
.charts polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
.charts .c0 { stroke: var(--line-1); } .charts .f0 { fill: var(--line-1); } .charts .k0 { background: var(--line-1); }
.charts .c1 { stroke: var(--line-2); } .charts .f1 { fill: var(--line-2); } .charts .k1 { background: var(--line-2); }
.charts .legend { display: flex; gap: 12px; margin: 0; font-size: .85rem; }
.charts .legend i { display: inline-block; width: 12px; height: 3px; border-radius: 2px; margin-right: 5px;
  vertical-align: middle; }
.charts .empty { height: 130px; display: grid; place-items: center; color: var(--body-text-color-subdued);
  font-size: .85rem; }

.progress { height: 8px; border-radius: 4px; background: var(--grid); overflow: hidden; margin: 8px 2px 4px; }
.progress div { height: 100%; background: var(--primary-500); transition: width .4s; }
.samples { padding: 8px 14px 12px; margin-top: 12px; }
.samples h4 { margin: 2px 0 6px; font-size: .92rem; overflow-wrap: anywhere; }
.sample-row { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(200px, 1fr); gap: 14px;
  overflow-x: auto; }
.sample header { font-size: .8rem; color: var(--body-text-color-subdued); }
.sample .text { font-size: .88rem; }

#data-table { --font-mono: var(--font); }
#chat-new { align-self: flex-start; width: auto; flex-grow: 0; padding-inline: 18px; }
#vote-buttons { gap: 8px; flex-wrap: wrap; }
#vote-buttons button { min-width: 118px; flex: 1 1 118px; }
@media (max-width: 640px) {
  .gradio-container .fillable { padding: 8px !important; }
  dl.facts { grid-template-columns: 1fr; gap: 1px; }
  dl.facts dd { margin-bottom: 6px; }
  .bar { flex-wrap: wrap !important; }
  .bar > .form { flex-basis: 100% !important; }
  .gradio-container .tab-container button { padding: 0 9px; font-size: .9rem; }
  #vote-buttons button { min-width: 45%; }
  #head span { font-size: .84rem; }
  /* What a narrow page has no room for: the line of a pair; and of an adapter what its passport says, too. */
  #data-table .first-column { display: none !important; }
  table.plain.names :is(th, td):is(:nth-child(2), :nth-child(3), :nth-child(4), :nth-child(5)) { display: none; }
  table.plain.names :is(th, td) { white-space: normal !important; padding-right: 8px !important; }
}
"""

KEYS = {"vote-a": ("1", "ArrowLeft"), "vote-b": ("2", "ArrowRight"), "vote-good": ("3",)}
KEYS |= {"vote-bad": ("4",), "vote-skip": ("0", "s")}
"""Button of the Vote tab -> its keys."""
SHOWN_AS = {"ArrowLeft": "←", "ArrowRight": "→"}

_SCRIPT = """
<script>
(() => {
  const keys = %s;
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    const at = event.target;
    const typing = "input, textarea, select, [contenteditable], [role=listbox]";
    if (at && at.closest && at.closest(typing)) return;
    const button = document.getElementById(keys[event.key]);
    if (!button || button.disabled || button.offsetParent === null) return;
    event.preventDefault();
    button.click();
  });
})();
</script>
"""


def css() -> str:
    """All styles; the keys of the Vote tab are written on its buttons where there is a keyboard."""
    hints = "".join(
        f'#{button}::after {{ content: "{" ".join(SHOWN_AS.get(key, key) for key in keys)}"; margin-left: 10px; '
        "font-weight: 400; font-size: .85em; opacity: .75; }"
        for button, keys in KEYS.items()
    )
    return f"{CSS}@media (hover: hover) and (min-width: 900px) {{ {hints} }}"


def head() -> str:
    """What goes into the page's head."""
    return _SCRIPT % json.dumps({key: button for button, keys in KEYS.items() for key in keys})


def theme() -> Any:
    """Gradio's default with system fonts and a calmer colour: no font is fetched."""
    import gradio as gr

    return gr.themes.Default(
        primary_hue=gr.themes.colors.blue,
        neutral_hue=gr.themes.colors.slate,
        spacing_size=gr.themes.sizes.spacing_sm,
        font=["system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "Menlo", "monospace"],
    )
