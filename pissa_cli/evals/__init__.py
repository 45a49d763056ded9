"""Benchmarks, one file each, and the engine that generates their answers."""
