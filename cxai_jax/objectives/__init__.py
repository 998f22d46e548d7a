"""What a step minimises, and on what: losses, mixing, alignment of saliency maps.

Imports maps and models.
"""
