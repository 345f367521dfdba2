"""Descriptions of images: captions for a folder of them, and the prompt of a photograph."""
