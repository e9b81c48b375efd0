"""Backends that are wrong on purpose, as a third party could write them: each must be caught, by checks that it names.

`IMPOSTORS` is the list. A change of the kit that lets one through is a defect of the kit.
"""

from attn_dispatch.conformance.impostors import masks, memory, numbers, state
from attn_dispatch.conformance.impostors.honest import IMPOSTORS, Honest, Impostor

__all__ = ["IMPOSTORS", "Honest", "Impostor", "masks", "memory", "numbers", "state"]
