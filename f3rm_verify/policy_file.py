"""Reads a policy from `f3rm-verify.toml`, or from `[tool.f3rm-verify]` in pyproject.toml; see docs/policy.md."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from f3rm_verify.difference import ARTEFACTS
from f3rm_verify.errors import UsageError
from f3rm_verify.policy import IGNORABLE, IGNORED, LIMITED, Limit, Policy

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

POLICY_FILE = "f3rm-verify.toml"
PYPROJECT = "pyproject.toml"
TABLE = "f3rm-verify"

#: Far more than a policy needs.
_MAX_BYTES = 2**20
_LARGEST = 10**18
_KEYS = ("required", "flip", "ignore", "limits")
#: Which limits can be set in an artefact.
_VALUE_LIMITS = ("absolute", "relative", "ulps")
_LIMITS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(LIMITED, _VALUE_LIMITS),
    "curves": (*_VALUE_LIMITS, "pixels", "psnr"),
    "renders": (*_VALUE_LIMITS, "pixels", "psnr"),
}
_NO_LIMITS: Mapping[str, str] = {
    "setup": "it holds the conditions of the runs; ignore what may differ, with a reason",
    "seeding": "its claims hold or do not",
    "trace": "its digests know only equal; where any limit is set, a trace that differs is shown and does not decide",
}
_NOT_IGNORED: Mapping[str, str] = {
    "seeding": "its claims hold or do not",
    "trace": "leave it out with `required`",
}


def find_policy(default: Policy, file: Path | None = None, *, folder: Path = Path()) -> Policy:
    """The policy in `file`, else in f3rm-verify.toml or pyproject.toml of `folder`; `default` where there is none.

    What the file does not say is as in `default`. Raises UsageError for a file that cannot be read, or that says
    something that is no policy.
    """
    if file is not None:
        table = _table(file)
        if table is None:
            raise UsageError(f"--policy {file}: has no table [tool.{TABLE}]; write one, or name another file.")
        return read_policy(table, default=default, source=_source(file))
    for path in (folder / POLICY_FILE, folder / PYPROJECT):
        table = _table(path) if path.is_file() else None
        if table is not None:
            return read_policy(table, default=default, source=_source(path))
    return default


def _source(path: Path) -> str:
    return f"{path} [tool.{TABLE}]" if path.name == PYPROJECT else str(path)


def _table(path: Path) -> Any:
    """What the file says of a policy; None for a pyproject.toml that says nothing."""
    try:
        with path.open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise UsageError(f"The policy {path} cannot be read: it is larger than {_MAX_BYTES} bytes.")
        data = tomllib.loads(content.decode("utf8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UsageError(f"The policy {path} cannot be read ({reason}); it must be a TOML file.") from error
    if path.name != PYPROJECT:
        return data
    tool = data.get("tool")
    return tool.get(TABLE) if isinstance(tool, dict) else None


def read_policy(table: Any, *, default: Policy, source: str) -> Policy:
    """The policy that the plain data of a TOML table says; raises UsageError that names `source` and the key."""
    try:
        _check_keys("the policy", table, _KEYS)
        policy = dataclasses.replace(
            default,
            required=_required(table["required"]) if "required" in table else default.required,
            ignored=_ignored(table.get("ignore", {})),
            limits=_limits(table.get("limits", {})),
            flip=_flag("flip", table.get("flip", default.flip)),
            source=source,
        )
        policy.check()
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from error
    return policy


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{key} is {value!r}; write true or false.")
    return value


def _required(names: Any) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError('required is no list of artefacts; write for example required = ["curves", "checkpoints"].')
    _check_names("required", names, ARTEFACTS)
    return tuple(dict.fromkeys(names))


def _ignored(tables: Any) -> dict[str, dict[str, str]]:
    """What every policy ignores, and what this one adds."""
    _check_artefacts("ignore", tables, IGNORABLE, _NOT_IGNORED)
    ignored = {artefact: dict(patterns) for artefact, patterns in IGNORED.items()}
    for artefact, patterns in tables.items():
        where = f"ignore.{artefact}"
        _check_table(where, patterns)
        for pattern, reason in patterns.items():
            if not isinstance(reason, str) or not any(map(str.isalnum, reason)):
                raise UsageError(f"{where} has no reason for {pattern!r}; write the reason as text behind the =.")
            ignored.setdefault(artefact, {})[pattern] = reason
    return ignored


def _limits(tables: Any) -> dict[str, tuple[Limit, ...]]:
    _check_artefacts("limits", tables, LIMITED, _NO_LIMITS)
    limits = {}
    for artefact, patterns in tables.items():
        _check_table(f"limits.{artefact}", patterns)
        limits[artefact] = tuple(_limit(artefact, pattern, numbers) for pattern, numbers in patterns.items())
    return {artefact: found for artefact, found in limits.items() if found}


def _limit(artefact: str, pattern: str, numbers: Any) -> Limit:
    where = f"limits.{artefact}.{pattern!r}"
    if pattern in _LIMITS[artefact] and not isinstance(numbers, dict):
        raise UsageError(
            f'limits.{artefact} has {pattern} without a pattern; write [limits.{artefact}."*"] above it for everything.'
        )
    _check_keys(where, numbers, _LIMITS[artefact])
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int if key == "ulps" else (int, float)):
            kind = "a whole number" if key == "ulps" else "a number"
            raise UsageError(f"{where}: {key} is {value!r}, and not {kind}.")
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise UsageError(f"{where}: {key} is larger than any limit that makes sense.")
    return Limit(pattern=pattern, **numbers)


def _check_artefacts(where: str, tables: Any, allowed: Collection[str], refused: Mapping[str, str]) -> None:
    _check_table(where, tables)
    for name in tables:
        if name in refused:
            raise UsageError(f"{where}.{name} cannot be set: {refused[name]}.")
    _check_names(where, tables, allowed)


def _check_keys(where: str, table: Any, allowed: Collection[str]) -> None:
    _check_table(where, table)
    _check_names(where, table, allowed)


def _check_table(where: str, table: Any) -> None:
    if not isinstance(table, dict):
        raise UsageError(f"{where} is {type(table).__name__}, and not a table.")


def _check_names(where: str, names: Collection[str], allowed: Collection[str]) -> None:
    for name in names:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(allowed)}."
            raise UsageError(f"{where} has no {name!r}; {hint}")
