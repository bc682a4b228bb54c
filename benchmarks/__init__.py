"""Measurements: ours against a plain implementation in the reference's way, in one process."""
