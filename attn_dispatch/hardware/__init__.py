"""What machine is this: its CPU, its accelerators, and what stands between this process and them.

Read from files of the operating system alone (`/dev`, `/sys`, `/proc`): no vendor is imported, no device is opened,
no process is started, so it costs a millisecond and is safe before `fork`. An installed library is no evidence of
hardware. The package needs nothing but the standard library, and nothing else of attn_dispatch (its imports are
relative so that this can be shown by loading it alone).

    machine = detect()
    machine.name          # "cpu", "cuda", "rocm", "xpu" or "tpu"
    machine.facts["isa"]  # ("avx2", "avx512f", "avx512_bf16")
"""

from .detect import ORDER, Platform, detect
from .device import Device

__all__ = ["ORDER", "Device", "Platform", "detect"]
