"""Shared by all tests. Without a GPU, Triton kernels run in Triton's interpreter on the CPU."""

import os

import torch

# Read by Triton when a kernel is defined, so it must be set before any kernel module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
