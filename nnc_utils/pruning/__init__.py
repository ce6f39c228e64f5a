"""Pruning: what can be removed from a network, a file a method."""
