"""From names and paths to models with their weights."""
