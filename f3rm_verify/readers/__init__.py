"""Readers of the file formats in a run directory. None of them executes anything that it reads."""
