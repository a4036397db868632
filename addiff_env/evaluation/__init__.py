"""Evaluation: benchmarks, methods, metrics, rows, and the report."""
