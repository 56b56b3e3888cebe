"""Several ranks: where each leaves its evidence, and what they must have in common."""

from __future__ import annotations

from pathlib import Path

from f3rm_verify.run_dir import RANKS


def rank_directory(run: Path, rank: int) -> Path:
    """Where a rank leaves its evidence: rank 0 in the run directory, rank r in a run directory of its own inside."""
    return run if rank == 0 else run / RANKS / str(rank)
