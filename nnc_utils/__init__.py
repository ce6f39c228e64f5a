"""Helpers of the compression notebooks; see DESIGN in the README for the floors they stand on."""
