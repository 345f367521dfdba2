"""Attention between words and image: watched, measured, drawn."""
