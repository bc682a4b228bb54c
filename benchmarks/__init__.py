"""Benchmarks of maple-clip against a plain implementation of the published way, in one process."""
