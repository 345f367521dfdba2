"""Benchmarks compare with diffusers: without it, none of their tests is collected."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("diffusers") else ["test_*.py"]
