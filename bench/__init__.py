"""Benchmarks, experiments and the methods to compare with."""
