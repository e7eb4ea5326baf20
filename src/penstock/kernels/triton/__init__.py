"""GPU kernels in Triton: the op table's meaning on an NVIDIA card, checked in Triton's interpreter where there is none.

Owns: nothing.
Never: is imported by a module outside but when GPU kernels are asked for: triton is an optional extra. Waits for the
device: grids follow from shapes and from what the host knows.

Every kernel's docstring says what it moves or computes at least, from which its share of the machine's limit follows.
Not measured on a GPU yet: tile sizes, warps and stages are written down as data, to be tuned.

Numbers that change from step to step are not specialised, so that a kernel is compiled once for a model.
"""
