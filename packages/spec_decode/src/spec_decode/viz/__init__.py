"""Figures and tables of runs and benchmarks."""
