"""Compares editing methods on a benchmark."""
