"""Measurements of this product, each a command of its own: `python benchmarks/<name>.py --help`."""
