"""Committed tables as text: the headline, what is claimed, and report.md."""
