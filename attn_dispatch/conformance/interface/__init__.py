"""Checks of calls against vendors' real packages, without their hardware: for authors of backends.

Where a vendor's function would be entered stands a stub: what it is given must bind to the real function's signature,
with arrays as kernels take them, and behind it is computed in float64 what the vendor documents that those arguments
mean. A case of the kit that passes so is right if the vendor does what it documents: evidence "interface".

packages     the vendors' packages, fetched and unpacked once
signatures   of functions in sources, without importing them
stub         where a vendor's function would be entered
semantics    attention in float64, by arguments in vendors' terms
"""

from attn_dispatch.conformance.interface.packages import Package, install_together
from attn_dispatch.conformance.interface.semantics import as_float64, attend_pages, attend_rows
from attn_dispatch.conformance.interface.signatures import signature
from attn_dispatch.conformance.interface.stub import SignatureStub

__all__ = ["Package", "SignatureStub", "as_float64", "attend_pages", "attend_rows", "install_together", "signature"]
