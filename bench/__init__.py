"""Measuring: our training step beside the reference implementation's, in one process, on one device."""
