"""C++ kernels that a machine compiles for its own processor, and their faces for torch.

This file does not know anything else.
"""
