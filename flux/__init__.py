"""FLUX.1 with its layers open: bypass them, score them, and edit through the vital ones. Importing this loads
nothing.
"""

__version__ = "0.1.0"
