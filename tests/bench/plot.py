"""Draws steps per second, squidstep_redis next to each alternative, as a self-contained SVG."""

from __future__ import annotations

from collections.abc import Iterable
from xml.sax.saxutils import escape

from bench.measure import Bars, figure

_WIDTH = 760
_LABELS = 250  # space to the left of the bars
_BAR = 22
_STEP = 30
_PANEL = 52  # above the first bar of a panel
_TITLE = 58
_FONTS = "system-ui, -apple-system, Segoe UI, Helvetica, Arial, DejaVu Sans, sans-serif"
_STYLE = """
text { font-size: 14px; fill: #374151 }
.title { font-size: 20px; font-weight: 600; fill: #111827 }
.panel { font-weight: 600; fill: #111827 }
.name, .ours { text-anchor: end }
.ours { font-weight: 600; fill: #0f766e }
.times, .note { fill: #6b7280 }
.note { font-size: 12px }
"""


def plot(panels: Iterable[Bars], note: str) -> str:
    """Draws panels, each with its own scale."""
    parts: list[str] = []
    y = _TITLE
    for panel in panels:
        bars = [(name, rate, "") for name, rate in panel.ours.items()]
        bars += [(name, rate, f"ours is {_times(ratio)}x") for name, (rate, ratio) in panel.others.items()]
        unit = (_WIDTH - _LABELS - 150) / max(rate for _, rate, _ in bars)
        y += _PANEL
        parts.append(f'<text class="panel" x="24" y="{y - 16}">{escape(panel.panel)}</text>')
        for name, rate, times in sorted(bars, key=lambda bar: -bar[1]):
            kind, fill = ("name", "#9ca3af") if times else ("ours", "#0f766e")
            length = max(2, rate * unit)
            middle = y + _BAR / 2 + 5
            parts.append(f'<text class="{kind}" x="{_LABELS - 10}" y="{middle}">{escape(name)}</text>')
            parts.append(f'<rect x="{_LABELS}" y="{y}" width="{length:.1f}" height="{_BAR}" rx="3" fill="{fill}"/>')
            label = f'{figure(rate)}  <tspan class="times">{times}</tspan>' if times else figure(rate)
            parts.append(f'<text class="rate" x="{_LABELS + length + 8:.1f}" y="{middle}">{label}</text>')
            y += _STEP
    height = y + 44
    size = f'viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{_FONTS}">',
            f"<style>{_STYLE}</style>",
            f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
            '<text class="title" x="24" y="38">Steps per second, begun and completed</text>',
            *parts,
            f'<text class="note" x="24" y="{height - 16}">{escape(note)}</text>',
            "</svg>",
            "",
        ]
    )


def _times(ratio: float) -> str:
    return figure(ratio) if ratio < 10 else f"{ratio:.0f}"
