"""Which tests one worker gets when several run the suite."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

import pytest

#: Files of tests that look at the same trainings, so that these are made once.
_SHARE_TRAININGS = {"test_explain.py", "test_guide.py", "test_nerfstudio_tools.py", "test_run.py"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file stays whole, for what its tests share; files that share trainings stay together."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = PurePath(nodeid.partition("::")[0])
            return "trainings" if file.name in _SHARE_TRAININGS and file.parent.name == "end_to_end" else str(file)

    return ByFile(config, log)
