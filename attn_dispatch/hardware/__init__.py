"""What machine is this: its CPU, its accelerators, and what stands between this process and them.

Read from files of the operating system alone (`/dev`, `/sys`, `/proc`): no vendor is imported, no device is opened,
no process is started, so it costs a millisecond and is safe before `fork`. An installed library is no evidence of
hardware. The package needs nothing but the standard library, and nothing else of attn_dispatch (its imports are
relative so that this can be shown by loading it alone).

    machine = detect()
    machine.name          # "cpu", "cuda"...: one of `platforms.NAMES`
    machine.facts["isa"]  # ("avx2", "avx512f", "avx512_bf16")
"""

from .detect import Platform, detect
from .device import Device
from .platforms import DEVICE_KINDS, NAMES, PLATFORMS, Hardware, by_kind, by_name

__all__ = ["DEVICE_KINDS", "NAMES", "PLATFORMS", "Device", "Hardware", "Platform", "by_kind", "by_name", "detect"]
