"""FLUX.1 with its layers open: skip them, score them, and edit through the vital ones.

Importing this package loads nothing.
"""

__version__ = "0.2.0"
