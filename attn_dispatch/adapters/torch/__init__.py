"""For vendors whose arrays are torch's. Importing this package, `backend` and `plan` imports no torch.

backend        the base classes of backends: allocation, device checks, plans, one device batch per device
plan           a plan that holds its batch on devices, and is renewed there
device_batch   a batch on a device, brought over in one pinned copy
layer_tensors  tensors of one layer on a device: ALiBi slopes, sinks, scales
cache_tensors  a cache's memory, and the one way of writing to it
layer_pass     what surrounds a vendor's function: write, attend, sinks, rows that attend to nothing

Nothing here goes in a circle: a device batch knows no call, layer tensors know no backend, the plan is generic.
"""
