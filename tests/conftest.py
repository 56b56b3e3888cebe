"""Which tests of the suite stay together when it runs on several cores (`pytest -n 2 --dist loadgroup`)."""

from __future__ import annotations

import pytest

#: Trainings that tests of several modules look at. Made once: whoever looks at them is run by one worker.
SHARED = frozenset({"seeded", "unseeded", "nerfacto"})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules stay whole, so that what they make once is made once; what looks at a shared training is one group."""
    for item in items:
        shared = SHARED & set(getattr(item, "fixturenames", ()))
        item.add_marker(pytest.mark.xdist_group("trainings" if shared else str(item.path)))
