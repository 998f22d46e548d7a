"""A finished run put to use on new images: predictor, stored programs, table.

Imports training and everything below.
"""
