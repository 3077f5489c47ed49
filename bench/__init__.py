"""Benchmarks: our kernels and training step beside reference implementations, in one process, on one device."""
