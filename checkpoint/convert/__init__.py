"""Conversion between checkpoints of everstep and other formats; ``formats`` lists what there is.

``spec`` says declaratively how stored fragments make logical tensors, ``plan`` turns that into
views (pure), ``converted`` reads them box by box; writers take any ``source.Source``.
"""
