"""A timeline as an image, and as a page: files that need nothing but themselves."""

from __future__ import annotations

from html import escape
from typing import Final

from squidstep_redis import Outcome
from squidstep_redis.cli.bars import Bar, Timeline
from squidstep_redis.cli.texts import clean, span

_COLOURS: Final = {
    Outcome.COMPLETED: "#2e9e5b",
    Outcome.RUNNING: "#2a8fc7",
    Outcome.RELEASED: "#c7a12a",
    Outcome.FAILED: "#d0453b",
    Outcome.LEASE_EXPIRED: "#9b5bc0",
}
_ROW: Final = 22
_NAMES: Final = 200
_BARS: Final = 640
_WORDS: Final = 190
_TOP: Final = 58
_TICKS: Final = 5
_LONGEST: Final = 28  # characters of a name

_STYLE: Final = (
    "text{font:13px ui-sans-serif,system-ui,sans-serif;fill:#222}.h{font-weight:600;font-size:15px}.d{fill:#888}"
    "line{stroke:#ddd}@media(prefers-color-scheme:dark){text{fill:#ddd}.d{fill:#888}line{stroke:#333}"
    "rect.p{fill:#16181c}}"
)


def as_svg(timeline: Timeline) -> str:
    """The timeline as an SVG image."""
    width = _NAMES + _BARS + _WORDS
    height = _TOP + _ROW * len(timeline.bars) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="p" width="{width}" height="{height}" fill="#fff"/>',
        f'<text class="h" x="12" y="24">{escape(timeline.heading)}</text>',
    ]
    for tick in range(_TICKS):
        x = _NAMES + _BARS * tick / (_TICKS - 1)
        said = span(timeline.seconds * tick / (_TICKS - 1)) if tick else "0"
        parts.append(f'<line x1="{x:g}" x2="{x:g}" y1="{_TOP - 8}" y2="{height - 10}"/>')
        parts.append(f'<text class="d" x="{x:g}" y="{_TOP - 14}" text-anchor="middle">{said}</text>')
    for row, (bar, name) in enumerate(zip(timeline.bars, timeline.names(), strict=True)):
        parts += _row(timeline, bar, name, _TOP + _ROW * row)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _row(timeline: Timeline, bar: Bar, name: str, y: float) -> list[str]:
    name = clean(name)
    label = name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
    indent = 28 if name.startswith(" ") else 12
    style = ' class="d"' if bar.attempt is None or name.startswith(" ") else ""
    parts = [f'<text{style} x="{indent}" y="{y + 14:g}">{escape(label.strip())}</text>']
    words = escape(bar.told(timeline.now))
    if bar.attempt is None:
        return [*parts, f'<text class="d" x="{_NAMES}" y="{y + 14:g}">{words}</text>']
    since, length = timeline.place(bar)
    x, width = _NAMES + _BARS * since, max(_BARS * length, 2)
    owner = f", {clean(bar.attempt.owner)}" if bar.attempt.owner else ""
    title = escape(f"{clean(bar.step)}, attempt {bar.attempt.number}{owner}: ") + words
    colour = _COLOURS[bar.attempt.outcome]
    return [
        *parts,
        f'<rect x="{x:.1f}" y="{y + 3:g}" width="{width:.1f}" height="15" rx="2" fill="{colour}">',
        f"<title>{title}</title></rect>",
        f'<text x="{_NAMES + _BARS + 12}" y="{y + 14:g}">{words}</text>',
    ]


def as_html(timeline: Timeline) -> str:
    """The timeline as a page: the image, and a table of all attempts."""
    rows = "\n".join(_table_row(timeline, bar) for bar in timeline.bars)
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="color-scheme" content="light dark">
<title>{escape(clean(timeline.run))}</title>
<style>
body{{font:14px ui-sans-serif,system-ui,sans-serif;margin:1rem}}
svg{{max-width:100%;height:auto}}
td,th{{text-align:left;padding:.1rem 1.2rem .1rem 0}}
</style>
{as_svg(timeline)}<table>
<tr><th>step<th>attempt<th>owner<th>started (UTC)<th>took, outcome</tr>
{rows}
</table>
</html>
"""


def _table_row(timeline: Timeline, bar: Bar) -> str:
    attempt = bar.attempt
    number, owner, started = "", "", ""
    if attempt is not None:
        number, owner, started = str(attempt.number), attempt.owner or "", f"{attempt.started_at:%F %T.%f}"[:-3]
    cells = (bar.step, number, owner, started, bar.told(timeline.now))
    return f"<tr>{''.join(f'<td>{escape(clean(cell))}' for cell in cells)}</tr>"
