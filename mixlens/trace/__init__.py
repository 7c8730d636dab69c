"""Data model of recorded routing and activations, its files, and selections."""
