"""Draws steps per second, squidstep_redis next to each alternative, as a self-contained SVG."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from xml.sax.saxutils import escape

from bench.measure import figure

_WIDTH = 760
_LABELS = 190  # space to the left of the bars
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
_OURS = {
    "squidstep": "squidstep_redis",
    "chain": "with advance_step",
    "in batches": "in batches of 100",
}


def plot(panels: Iterable[Mapping[str, Any]], note: str) -> str:
    """Draws panels of `{"panel": title, "rates": {name: steps per second}}`, each with its own scale."""
    parts: list[str] = []
    y = _TITLE
    for panel in panels:
        rates: dict[str, float] = dict(panel["rates"])
        unit = (_WIDTH - _LABELS - 150) / max(rates.values())
        y += _PANEL
        parts.append(f'<text class="panel" x="24" y="{y - 16}">{escape(panel["panel"])}</text>')
        for name, rate in sorted(rates.items(), key=lambda item: -item[1]):
            ours = name in _OURS
            length = max(2, rate * unit)
            middle = y + _BAR / 2 + 5
            label = _OURS.get(name, name)
            parts.append(
                f'<text class="{"ours" if ours else "name"}" x="{_LABELS - 10}" y="{middle}">{escape(label)}</text>'
            )
            fill = "#0f766e" if ours else "#9ca3af"
            parts.append(f'<rect x="{_LABELS}" y="{y}" width="{length:.1f}" height="{_BAR}" rx="3" fill="{fill}"/>')
            times = "" if ours else f'  <tspan class="times">{_times(rates["squidstep"] / rate)}</tspan>'
            parts.append(f'<text class="rate" x="{_LABELS + length + 8:.1f}" y="{middle}">{figure(rate)}{times}</text>')
            y += _STEP
    height = y + 44
    size = f'viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{_FONTS}">',
            f"<style>{_STYLE}</style>",
            f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
            '<text class="title" x="24" y="38">Steps per second, begun and completed by one worker</text>',
            *parts,
            f'<text class="note" x="24" y="{height - 16}">{escape(note)}</text>',
            "</svg>",
            "",
        ]
    )


def _times(ratio: float) -> str:
    """The ratio as a label."""
    return f"ours is {figure(ratio) if ratio < 10 else f'{ratio:.0f}'}x"
