"""Test-time voting over masked images: rules, reused prefix, forward passes.

Imports maps, models, data and objectives.
"""
