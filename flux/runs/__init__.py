"""Runs: their records, folders that can be resumed, and work shared among processes."""
