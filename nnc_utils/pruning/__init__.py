"""Pruning: what may be cut from a network, a file a method."""
