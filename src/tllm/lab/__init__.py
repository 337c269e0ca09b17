"""Measurements: what a system does, beside what the hardware allows."""
