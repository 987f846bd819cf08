"""Colours and type of the figures: those of launch.report's light theme, on a card that any page behind may have."""

from typing import Any

INK, MUTED, GRID, CARD, LINE = "#1b1f24", "#667078", "#ecedea", "#ffffff", "#e2e3e0"
SERIES = ("#0b62a8", "#d3730a", "#15795a", "#b03a78", "#4d9fd6", "#8f7400", "#6551b0", "#7b8087")
BAD = "#b3401a"
FONT = {"family": "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", "size": 13, "color": MUTED}


def layout(title: str, under: str, **more: Any) -> dict[str, Any]:
    """A layout with the finding as its title, and what it was measured on under it."""
    text = f"<b>{title}</b><br><span style='font-size:13px;color:{MUTED}'>{under}</span>"
    place = {"x": 0, "xanchor": "left", "y": 1, "yanchor": "top", "pad": {"l": 20, "t": 26}}
    return {
        "title": {"text": text, "font": {**FONT, "size": 19, "color": INK}, **place},
        "font": FONT, "paper_bgcolor": CARD, "plot_bgcolor": CARD, "showlegend": False, **more,
    }  # fmt: skip
