"""What the launcher needs to know of a saved config.yml; the training itself loads it whole (`f3rm/saved_config`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from f3rm_verify.errors import UnreadableError, UsageError
from f3rm_verify.readers.config import TAG, read_config


@dataclass(frozen=True, kw_only=True)
class SavedConfig:
    """Method, seed, steps and data of a saved training.

    `foreign_provider` is the package of its data manager, None where that is nerfstudio's or ours.
    """

    path: Path
    method: str
    seed: int
    iters: int
    data: Path | None
    foreign_provider: str | None

    def existing_data(self) -> Path:
        """Its dataset; raises UsageError where that is not there any more."""
        if self.data is None:
            raise UsageError(f"--load-config {self.path} names no dataset; give one with --data.")
        if not self.data.exists():
            raise UsageError(
                f"--load-config {self.path} was trained on {self.data}, which does not exist any more; give --data."
            )
        return self.data


def read_saved_config(path: Path) -> SavedConfig:
    """Raises UsageError where the file is no saved configuration of a training, or goes on from one that is gone."""
    if not path.exists():
        raise UsageError(f"--load-config {path} does not exist; give the config.yml of an earlier training.")
    try:
        config = read_config(path)
    except UnreadableError as error:
        raise UsageError(f"--load-config {path} cannot be read: {error}") from error
    method, iters, seed = (_part(config, *keys) for keys in (("method_name",), ("max_num_iterations",), _SEED))
    if not isinstance(method, str) or type(iters) is not int or type(seed) is not int:
        raise UsageError(
            f"--load-config {path} is no configuration of a training: it has no method_name, no max_num_iterations or "
            "no machine.seed. Give the config.yml that nerfstudio wrote beside its checkpoints."
        )
    for key in ("load_dir", "load_checkpoint"):
        _require_start(path, key, _part(config, key))
    data = next((place for place in (_part(config, *keys) for keys in _DATA) if isinstance(place, str)), None)
    return SavedConfig(
        path=path,
        method=method,
        seed=seed,
        iters=iters,
        data=None if data is None else Path(data),
        foreign_provider=_foreign_provider(_part(config, "pipeline", "datamanager", TAG)),
    )


_SEED = ("machine", "seed")
#: Where a dataset can stand, the place that counts first.
_DATA = (("pipeline", "datamanager", "data"), ("pipeline", "datamanager", "dataparser", "data"), ("data",))


def _part(config: Any, *keys: str) -> Any:
    for key in keys:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _require_start(path: Path, key: str, start: Any) -> None:
    if isinstance(start, str) and not Path(start).exists():
        raise UsageError(
            f"--load-config {path} goes on from {start}, which does not exist any more; set {key} to null in a copy of "
            "it to train from the beginning."
        )


def _foreign_provider(tag: Any) -> str | None:
    package = str(tag or "").partition(":")[2].partition(".")[0]
    return None if package in ("", "nerfstudio", "f3rm_verify") else package
