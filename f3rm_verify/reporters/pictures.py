"""Pictures in the page: what is shown of each that differs, worst first."""

from __future__ import annotations

from typing import Any

from f3rm_verify import reporters as words
from f3rm_verify.assets import Assets, asset_names
from f3rm_verify.difference import Difference, Result

#: Pictures in the page; the result file has every one.
_MAX_PICTURES = 2000
_MAX_TEXT = 500
VIEWS = ("reference", "candidate", "heat")


def picture_rows(result: Result, assets: Assets, folder: str) -> tuple[list[dict[str, Any]], int]:
    """What the page shows of each picture, and how many more there are; addresses are relative, in `folder`.

    An address is None where there is no such asset.
    """
    nodes = picture_nodes(result)
    rows = [_row(path, node, assets, folder) for path, node in nodes[:_MAX_PICTURES]]
    return rows, max(len(nodes) - _MAX_PICTURES, 0)


def picture_nodes(result: Result) -> list[tuple[tuple[str, ...], Difference]]:
    """The nodes with pictures, worst first, with their paths; without the picture for people beside an array."""
    found = [
        (path, node) for path, node in words.worst_first(result) if {"reference", "candidate"} & {*asset_names(node)}
    ]
    arrays = {path for path, _ in found if not path[-1].endswith(".png")}
    return [(path, node) for path, node in found if path in arrays or not _is_copy(path, arrays)]


def _is_copy(path: tuple[str, ...], arrays: set[tuple[str, ...]]) -> bool:
    return (*path[:-1], path[-1].removesuffix(".png")) in arrays


def _row(path: tuple[str, ...], node: Difference, assets: Assets, folder: str) -> dict[str, Any]:
    names = asset_names(node)
    address = {key: f"{folder}/{name}" if assets.has(name) else None for key, name in names.items()}
    return {
        "name": " / ".join(words.clean(part) for part in path if part != "renders"),
        "verdict": node.verdict.value.replace("_", " "),
        "summary": words.summary_of(node)[:_MAX_TEXT],
        "size": _size(node),
        "region": _region(node.measures.get("region")),
        "thumbnail": address.get("thumbnail"),
        **{view: address.get(view) for view in VIEWS},
        "made": [view for view in VIEWS if view in names],
    }


def _size(node: Difference) -> str:
    """How much it differs, in a few words."""
    psnr, share = node.measures.get("psnr"), node.measures.get("share")
    parts = [f"{psnr:.1f} dB" if isinstance(psnr, float) else "", _percent(share) if isinstance(share, float) else ""]
    return ", ".join(filter(None, parts))


def _percent(share: float) -> str:
    return "under 0.1 % of pixels" if share < 0.001 else f"{share * 100:.3g} % of pixels"


def _region(value: Any) -> list[int] | None:
    """Row, column, height and width of the worst region."""
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        return None
    return [*value] if all(isinstance(each, int) and 0 <= each < 2**31 for each in value) else None
