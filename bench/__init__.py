"""Measurements: `python -m bench NAME`. Every figure is checked in the run that prints it."""
