"""Small steps on all threads: a test's are too small to be worth a second one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from attn_dispatch_cpu import planning


@pytest.fixture(autouse=True, scope="session")
def every_thread_is_woken() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "WORTH_WAKING", 1)
        yield
