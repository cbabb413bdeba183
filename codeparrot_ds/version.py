"""The version, read by setup.py without an import."""

from __future__ import annotations

__version__ = "0.1.0"
