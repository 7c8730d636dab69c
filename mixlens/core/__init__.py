"""Foundations shared by all packages: run directories, intervals, distributed processes and number formats."""
