"""Edits of generated images and photographs that keep what the prompt does not change."""
