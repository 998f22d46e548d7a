"""Numbers -> one self-contained HTML page: figures, pictures, page parts, pages.

Imports scoring and everything below; trains nothing and loads no model.
"""
