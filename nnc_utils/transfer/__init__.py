"""Transfer learning: a second task starts from the network, or the compressed file, of a first."""
