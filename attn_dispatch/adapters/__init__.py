"""For authors of backends: what adapters to vendors' kernels have in common. Public, versioned (docs/adapters.md).

environment   threads, the cache folder, versions and folders of installed packages (imports no vendor)
joint_pages   a layout: keys and values side by side, padded
batch         a batch without what kernels cannot be given, page lists, slots, fixed shapes (NumPy)
torch         for vendors whose arrays are torch's: the base backend, device batches, layer tensors, writing

Nothing else in the core imports this package, and importing it imports none of its modules.
"""

__all__ = ["ADAPTERS_VERSION"]

ADAPTERS_VERSION = 1
"""Raised when a name of this package changes its meaning, or goes."""
