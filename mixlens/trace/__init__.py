"""Recorded routing and activations: the data model, its files, and selections of it."""
