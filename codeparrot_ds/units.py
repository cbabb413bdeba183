"""Amounts as a person reads them."""

from __future__ import annotations


def size_text(size: float) -> str:
    """Bytes in the unit that leaves digits to read: ``310 bytes``, ``28.4 kB``, ``8.1 MB``, ``12,345.0 MB``."""
    if size < 1000:
        return f"{size:,.0f} bytes"
    return f"{size / 1e3:,.1f} kB" if size < 1e6 else f"{size / 1e6:,.1f} MB"
