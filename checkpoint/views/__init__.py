"""Views: what lets zarr-python, TensorStore and others open a checkpoint without this package.

A view is derived from the manifest alone and points into the packs; it holds no tensor data. No
module of these imports the software that reads the view. ``dcp`` is the other way round: torch DCP
saves and loads through it, in our format.
"""
