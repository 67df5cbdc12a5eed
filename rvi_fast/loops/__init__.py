"""Loops over a batch's rows and cells on a CPU, compiled by numba (extra `cpu`); the equations are reference.py's.

They take NumPy arrays and check nothing.
"""
