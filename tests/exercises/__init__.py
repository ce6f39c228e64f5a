"""Answers to the exercises: for each a second right one, and wrong ones with words that the checker says."""
