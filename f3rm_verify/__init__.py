"""Run the same training twice, compare everything it left behind, and name the first thing that broke."""

__version__ = "0.1.0"
