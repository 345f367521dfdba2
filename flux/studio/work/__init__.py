"""The work of each tab, done with the loaded model."""
