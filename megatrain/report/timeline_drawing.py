"""Draw pipeline timelines (`planner/timeline.py`) as SVG. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from megatrain.planner.timeline import Timeline
from megatrain.report.page import read_asset

_NAMES = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, weights"}
_ROW, _LEFT, _WIDTH = 22, 52, 1000


def draw(timelines: Sequence[tuple[str, Timeline]]) -> str:
    """Return an SVG of titled timelines on a shared time axis, with a row per rank and numbered micro-batches.

    Paler blocks belong to a rank's later stages; grey is idle time. In a report page, the page sets the colours.
    """
    longest = max(timeline.length for _, timeline in timelines)
    scale = (_WIDTH - _LEFT - 4) / longest
    parts, y = [], 16
    for title, timeline in timelines:
        if title:
            parts.append(f'<text x="0" y="{y}">{title}</text>')
            y += 8
        for rank, spans in enumerate(timeline.ranks):
            parts.append(f'<text x="0" y="{y + 14}">rank {rank}</text>')
            parts.append(_box("idle", _LEFT, y, timeline.length * scale))
            first = min(span.action.stage for span in spans)
            for (stage, kind, m), start, end in spans:
                if end > start:
                    x, width = _LEFT + start * scale, (end - start) * scale
                    parts.append(_box(kind + (" later" if stage != first else ""), x, y, width - min(1.0, width / 8)))
                    if width >= 13:
                        parts.append(f'<text class="number" x="{x + width / 2:.1f}" y="{y + 13}">{m}</text>')
            y += _ROW
        y += 22
    kinds = sorted(
        {span.action.kind for _, timeline in timelines for spans in timeline.ranks for span in spans}, key="FBIW".index
    )
    x = float(_LEFT)
    for kind in [*kinds, "idle"]:
        parts.append(f'<rect class="{kind}" x="{x:g}" y="{y - 10}" width="12" height="12" rx="2"/>')
        parts.append(f'<text x="{x + 17:g}" y="{y}">{_NAMES.get(kind, "waiting")}</text>')
        x += 130
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="pipeline" viewBox="0 0 {_WIDTH} {y + 8}" role="img" '
        f'aria-label="Pipeline schedule"><style>{read_asset("timeline.css")}</style>{"".join(parts)}</svg>'
    )


def _box(kind: str, x: float, y: float, width: float) -> str:
    return f'<rect class="{kind}" x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_ROW - 4}" rx="1.5"/>'
