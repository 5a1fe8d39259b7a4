"""Figures of vmferry, each beside the raw limit of the same kind in the same run. `python -m tests.bench`, or `make bench`.

No test of speed: nothing here fails for being slow. docs/performance.md has the figures of one run and what bounds each.
"""
