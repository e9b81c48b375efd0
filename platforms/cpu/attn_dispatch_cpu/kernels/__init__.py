"""The kernels: LLVM vector code built in Numba intrinsics, and the loops around it in Numba."""
