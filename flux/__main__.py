"""Entry point of `python -m flux`."""

from flux.cli import app

if __name__ == "__main__":
    app()
