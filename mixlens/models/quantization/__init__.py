"""Quantization that reaches the experts: schemes, packed weights, loading them tensor by tensor."""
