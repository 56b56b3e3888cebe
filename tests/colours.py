"""Colours as people see them."""

from __future__ import annotations

import re


def luminance(colour: str) -> float:
    """Of WCAG 2, of a colour as `rgb(1, 2, 3)`."""
    parts = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
