"""Edits of routing and activations while a model runs."""
