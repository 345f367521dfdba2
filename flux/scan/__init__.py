"""Scans: which layers of a model are vital."""
