"""The work of each tab and endpoint.

Functions called `make_...` compute with an engine, in the thread of a run. Those called `run_...` do it as a
visitor's run: they save what is made, and yield the run's updates.
"""
