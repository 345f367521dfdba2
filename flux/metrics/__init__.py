"""Similarity of images: pixels, features, and measures of edits."""
