"""Predictions file -> numbers: metrics, calibration, the measured explanations.

Imports methods and everything below; draws nothing.
"""
