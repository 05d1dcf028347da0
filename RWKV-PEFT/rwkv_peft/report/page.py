"""The HTML elements of report.html: one page without scripts, and without fonts or pictures from other files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape

from rwkv_peft.data.inspect.token_view import escape_controls

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5d6878; --line: #d9dee6; --back: #ffffff; --card: #f5f7fa;
  --main: #1f5fbf; --raw: #a9c3ea; --other: #c2500c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa6b6; --line: #38424f; --back: #14181d;
  --card: #1e242b; --main: #79aaf2; --raw: #4c72ab; --other: #f0935a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 16px; max-width: 1000px; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5em; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15em; margin: 1.8em 0 .6em; border-bottom: 1px solid var(--line); }
h3 { font-size: .9em; font-weight: normal; color: var(--soft); margin: .5em 0 0; }
.sample { border-left: 3px solid var(--line); padding-left: 12px; margin: 16px 0; }
.soft, figcaption, th { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 10px; margin: 16px 0; }
.tiles div { background: var(--card); border-radius: 6px; padding: 8px 12px; overflow-wrap: anywhere; }
.tiles b { display: block; font-size: 1.2em; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 16px; }
figure { margin: 0; break-inside: avoid; }
svg { width: 100%; height: auto; display: block; }
svg text { font-size: 11px; fill: var(--soft); }
.grid { stroke: var(--line); }
polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
polyline.raw { stroke: var(--raw); stroke-width: 1; } circle.raw { fill: var(--raw); }
polyline.main { stroke: var(--main); } circle.main { fill: var(--main); }
polyline.other { stroke: var(--other); } circle.other { fill: var(--other); }
.legend { font-size: .85em; } .legend span { margin-right: 14px; }
.legend span::before { content: ""; display: inline-block; width: 14px; height: 3px; margin-right: 5px;
  vertical-align: middle; background: var(--main); }
.legend .raw::before { background: var(--raw); } .legend .other::before { background: var(--other); }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: 3px 12px 3px 0; border-bottom: 1px solid var(--line);
  font-weight: normal; overflow-wrap: anywhere; }
th { width: 11em; }
pre { background: var(--card); border-radius: 6px; padding: 10px 12px; margin: 6px 0; overflow-x: auto;
  font: 13px/1.45 ui-monospace, monospace; }
pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--soft); margin: 8px 0; }
@media (max-width: 500px) { th { width: 7.5em; } pre { font-size: 11px; } }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --line: #ccc; --back: #fff; --card: #f5f5f5;
  --main: #1f5fbf; --raw: #a9c3ea; --other: #c2500c; }
  body { max-width: none; padding: 0; font-size: 11px; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 9px; } .tiles div { border: 1px solid var(--line); }
  h2, h3 { break-after: avoid; } pre, tr { break-inside: avoid; }
  .charts { grid-template-columns: 1fr 1fr; } }
"""

HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
"""
"""The policy stops a browser from running or loading anything that a text from the data could contain."""


def text(value: object) -> str:
    """Return a text as HTML. Control characters are shown as escape sequences."""
    return escape(escape_controls(str(value).encode("utf-8", "replace").decode("utf-8")))


def page(title: str, subtitle: str, parts: Iterable[str]) -> str:
    """Return the whole file; parts that are empty are omitted."""
    head = HEAD.format(title=text(title), style=STYLE)
    top = f'<h1>{text(title)}</h1>\n<p class="soft">{text(subtitle)}</p>'
    return "\n".join([head, top, *(part for part in parts if part), "</body>\n</html>\n"])


def section(title: str, *parts: str) -> str:
    """Return a heading and the parts that are not empty, or "" if all parts are empty."""
    filled = [part for part in parts if part]
    return "\n".join([f"<section><h2>{text(title)}</h2>", *filled, "</section>"]) if filled else ""


def tiles(values: Mapping[str, str]) -> str:
    """Return a row of boxes, each with a name and a large value."""
    inner = "".join(f"<div>{text(name)}<b>{text(value)}</b></div>" for name, value in values.items())
    return f'<div class="tiles">{inner}</div>'


def table(rows: Mapping[str, object]) -> str:
    """Return a table with a name and a value per row, or "" without rows."""
    lines = [f'<tr><th scope="row">{text(name)}</th><td>{text(value)}</td></tr>' for name, value in rows.items()]
    return "\n".join(["<table>", *lines, "</table>"]) if lines else ""


def links(rows: Mapping[str, tuple[str, str]]) -> str:
    """Return a table with a link and a remark per row, or "" without rows; `rows` is name: (address, remark)."""
    lines = [
        f'<tr><td><a href="{escape(address)}">{text(name)}</a></td><td>{text(remark)}</td></tr>'
        for name, (address, remark) in rows.items()
    ]
    return "\n".join(["<table>", *lines, "</table>"]) if lines else ""


def pre(content: str, *, wrap: bool = False) -> str:
    """Return preformatted text; `wrap` breaks long lines."""
    tag = '<pre class="wrap">' if wrap else "<pre>"
    return f"{tag}{text(content)}</pre>" if content else ""


def folded(title: str, content: str) -> str:
    """Return content that a click on its title shows."""
    return f"<details><summary>{text(title)}</summary>\n{content}\n</details>" if content else ""
