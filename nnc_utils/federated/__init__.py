"""Federated averaging between processes: who has which images, what is sent, server and clients."""
