"""A run from its config to its results: plan, compile, loop, checkpoints, check.

Imports report and everything below.
"""
