"""The train steps: one file per method that needs a step of its own.

Imports voting, objectives, data, maps and models; knows neither loop nor files.
"""
