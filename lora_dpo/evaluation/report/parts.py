"""The parts that every page is made of. All text is escaped here: nothing of data or model becomes markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1d2430;--soft:#5b6675;--line:#dfe3e8;--card:#f6f7f9;--good:#1f7a4a;
--bad:#b3382c;--warn:#9a6700;--c0:#2a6fb0;--c1:#c4512d;--c2:#2f8a57;--c3:#8a5bb5;--c4:#b8860b;--c5:#3b8ea5;--c6:#b04a80;
--c7:#6b7280}
@media(prefers-color-scheme:dark){:root{--bg:#14181f;--fg:#e6e9ee;--soft:#9aa5b4;--line:#2c3440;--card:#1c222b;
--good:#5cc48d;--bad:#f0857a;--warn:#e0b341;
--c0:#6aaeea;--c1:#f08a64;--c2:#63c48f;--c3:#bd96e3;--c4:#e0b341;--c5:#6cc3da;
--c6:#e284b5;--c7:#a2abb8}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1080px;padding:24px 20px 60px;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:24px;margin:0 0 4px}
h2{font-size:18px;margin:34px 0 10px;border-bottom:1px solid var(--line);padding-bottom:4px}
p{margin:6px 0}.soft{color:var(--soft)}.good{color:var(--good)}.bad{color:var(--bad)}.warn{color:var(--warn)}
.box{background:var(--card);border:1px solid var(--line);border-left:4px solid var(--c0);border-radius:6px;
padding:10px 14px;margin:12px 0}
.box.bad{border-left-color:var(--bad);color:inherit}.box.warn{border-left-color:var(--warn);color:inherit}
.box.good{border-left-color:var(--good);color:inherit}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:5px 10px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;color:var(--soft);font-size:13px}td.n,th.n{text-align:right}td.n{white-space:nowrap}td.w{min-width:8em}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(340px,1fr));gap:14px}
@media(max-width:420px){.grid{grid-template-columns:1fr}}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:6px;padding:8px 10px}
figcaption{font-weight:600;font-size:14px;margin-bottom:4px}svg{width:100%;height:auto;display:block}
svg .gl{stroke:var(--line);stroke-width:1}svg .level{stroke:var(--soft);stroke-width:1;stroke-dasharray:4 3}
svg .tick,svg .name{font-size:11px;fill:var(--soft)}svg .name{fill:var(--fg);font-size:12px}
svg polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}svg line.c0{stroke-width:2.4}svg rect{opacity:.6}
.legend{font-size:13px;color:var(--soft);display:flex;flex-wrap:wrap;gap:4px 14px;margin:4px 0 0}
.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:5px;vertical-align:-1px}
.answers td{width:38%;white-space:pre-wrap;overflow-wrap:anywhere}.answers td:first-child{width:24%;font-weight:600}
.many td{width:auto;min-width:180px}
.key td:first-child{white-space:nowrap;color:var(--soft);width:1%;padding-right:18px}
.key td{overflow-wrap:anywhere}code{font:13px ui-monospace,Menlo,Consolas,monospace}
footer{margin-top:40px;color:var(--soft);font-size:13px}
"""
_COLOURS = "".join(
    f"svg .c{n}{{stroke:var(--c{n})}}svg .f{n}{{fill:var(--c{n})}}.k{n}{{background:var(--c{n})}}" for n in range(8)
)
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""The page may load nothing at all, not even if a text in it got through as markup."""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole document: one file, no script, nothing that is loaded from elsewhere."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}{_COLOURS}</style></head><body>\n"
        + "\n".join(part for part in parts if part)
        + "\n<footer>Made by lora-dpo. This page is one file and loads nothing.</footer></body></html>\n"
    )


def heading(title: str, under: str = "") -> str:
    """The page's title, and a line under it."""
    return f"<h1>{escape(title)}</h1>" + (f'<p class="soft">{escape(under)}</p>' if under else "")


def section(title: str, *parts: str) -> str:
    """A part of the page; nothing if it is empty."""
    body = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def box(text: str, kind: str = "") -> str:
    """A sentence that must not be overlooked; `kind` is good, bad, warn or empty."""
    return f'<p class="box {kind}">{escape(text)}</p>'


def paragraph(text: str) -> str:
    """A paragraph in the softer colour."""
    return f'<p class="soft">{escape(text)}</p>'


def plots(*figures: str) -> str:
    """Figures side by side where there is room."""
    body = "".join(figures)
    return f'<div class="grid">{body}</div>' if body else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers_from: int = 1) -> str:
    """A table; cells from column `numbers_from` on are numbers, at the right; words in one without a name."""
    if not rows:
        return ""
    kind = ["" if index < numbers_from else 'class="n"' if name else 'class="w"' for index, name in enumerate(head)]
    first = "".join(f"<th {kind[i]}>{escape(name)}</th>" for i, name in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td {kind[i]}>{escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table></div>'


def keys(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values."""
    if not rows:
        return ""
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<table class="key"><tbody>{body}</tbody></table>'


def answers(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Prompts with the answers of two or more models, side by side."""
    if not rows:
        return ""
    first = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    many = " many" if len(head) > 3 else ""
    return (
        f'<div class="scroll"><table class="answers{many}"><thead><tr>{first}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
