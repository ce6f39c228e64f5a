"""Quantization: weights and activations as few-bit integers."""
