"""Views: what lets zarr-python, TensorStore and others open a checkpoint without this package.

A view is derived from the manifest alone and points into the packs; it holds no tensor data. No
module here imports the software that reads the view.
"""
