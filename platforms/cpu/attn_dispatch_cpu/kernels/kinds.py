"""Element types in memory, as the small integers that kernels get at run time."""

from __future__ import annotations

from typing import Final

KIND_F32: Final = 0
KIND_F16: Final = 1
KIND_BF16: Final = 2
KIND_INT8: Final = 3
KIND_E4M3: Final = 4
KIND_E5M2: Final = 5

KINDS: Final = {
    "float32": KIND_F32,
    "float16": KIND_F16,
    "bfloat16": KIND_BF16,
    "int8": KIND_INT8,
    "float8_e4m3fn": KIND_E4M3,
    "float8_e5m2": KIND_E5M2,
}
ITEM_BYTES: Final = (4, 2, 2, 1, 1, 1)
