"""The Triton kernels; import only where Triton is installed."""
