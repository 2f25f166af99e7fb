"""A timeline as an SVG image, and as an HTML page. Both files are self-contained.

rich can export what a terminal shows. Its image is worse: a bar is at least one character wide, the labels of the axis
shift where a viewer drops spaces, bars have no tooltips, and the image refers to fonts on another host.
"""

from __future__ import annotations

from html import escape
from typing import Final

from squidstep_redis import Outcome
from squidstep_redis.escaping import escaped
from squidstep_redis.formatting import cut
from squidstep_redis.timelines import Bar, Timeline

_COLORS: Final = {
    Outcome.COMPLETED: "#2e9e5b",
    Outcome.RUNNING: "#2a8fc7",
    Outcome.RELEASED: "#c7a12a",
    Outcome.FAILED: "#d0453b",
    Outcome.LEASE_EXPIRED: "#9b5bc0",
}
# In pixels, except _MAX_LABEL, which is in characters.
_ROW: Final = 22
_TOP: Final = 58
_AXIS_X: Final = 200
_AXIS: Final = 640
_WIDTH: Final = 1_030
_MAX_LABEL: Final = 28

_STYLE: Final = (
    "text{font:13px ui-sans-serif,system-ui,sans-serif;fill:#222}.h{font-weight:600;font-size:15px}.d{fill:#888}"
    ".m{text-anchor:middle}line{stroke:#ddd}@media(prefers-color-scheme:dark){text{fill:#ddd}.d{fill:#888}line{stroke:#333}"
    "rect.p{fill:#16181c}}"
)
_PAGE: Final = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>body{{font:14px ui-sans-serif,system-ui,sans-serif;margin:1rem}}svg{{max-width:100%;height:auto}}
td,th{{text-align:left;padding:.1rem 1.2rem .1rem 0}}</style>
{svg}<table><tr><th>step<th>attempt<th>owner<th>started (UTC)<th>duration, outcome</tr>
{rows}
</table></html>
"""


def as_svg(timeline: Timeline) -> str:
    """Draws the timeline as an SVG image, with a tooltip for each bar."""
    height = _TOP + _ROW * len(timeline.bars) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}">',
        f'<style>{_STYLE}</style><rect class="p" width="{_WIDTH}" height="{height}" fill="#fff"/>',
        _text(12, 24, timeline.heading, "h"),
    ]
    for position, label in timeline.ticks(5):
        x = round(_AXIS_X + _AXIS * position)
        parts.append(f'<line x1="{x}" x2="{x}" y1="{_TOP - 8}" y2="{height - 10}"/>')
        parts.append(_text(x, _TOP - 14, label, "d m"))
    for row, (bar, label) in enumerate(zip(timeline.bars, timeline.labels(), strict=True)):
        parts.append(_draw_row(timeline, bar, escaped(label), _TOP + _ROW * row))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _draw_row(timeline: Timeline, bar: Bar, label: str, y: int) -> str:
    is_indented = label.startswith(" ")
    name = _label(28 if is_indented else 12, y, label.strip(), "d" if is_indented or bar.attempt is None else "")
    summary, outcome = bar.summary(timeline.now), bar.outcome(timeline.now)
    if bar.attempt is None or outcome is None:
        return name + _text(_AXIS_X, y + 14, summary, "d")
    start, length = timeline.position(bar)
    owner = f", {bar.attempt.owner}" if bar.attempt.owner else ""
    tooltip = escape(escaped(f"{bar.step}, attempt {bar.attempt.number}{owner}: {summary}"))
    rect = (
        f'<rect x="{_AXIS_X + _AXIS * start:.1f}" y="{y + 3}" width="{max(_AXIS * length, 2):.1f}" height="15" rx="2" '
        f'fill="{_COLORS[outcome]}"><title>{tooltip}</title></rect>'
    )
    return name + rect + _text(_AXIS_X + _AXIS + 12, y + 14, summary, "")


def _label(x: int, y: int, text: str, css_class: str) -> str:
    """Draws the name of a row. An inner image clips it, so that it cannot overlap the bars in any font."""
    shown = cut(text, _MAX_LABEL)
    title = "" if shown == text else f"<title>{escape(text)}</title>"
    size = f'x="{x}" y="{y}" width="{_AXIS_X - 12 - x}" height="{_ROW}"'
    return f'<svg {size}><text class="{css_class}" y="14">{escape(shown)}{title}</text></svg>'


def _text(x: int, y: int, text: str, css_class: str) -> str:
    return f'<text class="{css_class}" x="{x}" y="{y}">{escape(text)}</text>'


def as_html(timeline: Timeline) -> str:
    """Makes an HTML page: the image, and a table of all attempts."""
    rows = "\n".join(_table_row(timeline, bar) for bar in timeline.bars)
    return _PAGE.format(title=escape(escaped(timeline.run)), svg=as_svg(timeline), rows=rows)


def _table_row(timeline: Timeline, bar: Bar) -> str:
    number, owner, started = "", "", ""
    if (attempt := bar.attempt) is not None:
        number, owner, started = str(attempt.number), attempt.owner or "", f"{attempt.started_at:%F %T.%f}"[:-3]
    cells = (bar.step, number, owner, started, bar.summary(timeline.now))
    return f"<tr>{''.join(f'<td>{escape(escaped(cell))}' for cell in cells)}</tr>"
