"""Measurements that intervene: importance, contributions, the number of experts, quantization impact, trade-offs."""
