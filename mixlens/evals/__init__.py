"""Benchmark scores on lm-eval: the runner, its protocols and checks, the log of every sample, published references."""
