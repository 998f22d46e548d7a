"""Everything that is a map over an image: grids, class maps, saliency, their quality.

Imports the root only.
"""
