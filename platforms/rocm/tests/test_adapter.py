"""The kit over the whole adapter, by stubs that compute what the vendors document: on the host, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from attn_dispatch.conformance import BackendConformance
from platforms.rocm.evidence.packages import AITER, COMMAND, FLASH_ATTN
from platforms.rocm.evidence.stubs import HostAiter, HostFlashAttention, fake_machine, stubbed

from .conftest import COMPILED

pytestmark = pytest.mark.interface
if not (AITER.path.exists() and FLASH_ATTN.path.exists()):
    pytest.skip(f"not run: the vendors' packages were not fetched ({COMMAND})", allow_module_level=True)

BACKENDS = {
    "rocm/aiter": HostAiter("test/aiter", fake_machine("gfx942", AITER.path)),
    "rocm/flash-attention": HostFlashAttention("test/flash", fake_machine("gfx942", FLASH_ATTN.path, COMPILED)),
}


@pytest.fixture(autouse=True)
def _stubs() -> Iterator[None]:
    with stubbed(AITER.path, FLASH_ATTN.path):
        yield


class TestAiter(BackendConformance):
    backend = BACKENDS["rocm/aiter"]
    examples = 40


class TestFlashAttention(BackendConformance):
    backend = BACKENDS["rocm/flash-attention"]
    examples = 20
