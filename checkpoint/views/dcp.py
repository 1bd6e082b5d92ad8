"""Storage for torch DCP in everstep's format.

::

    dcp.save(state_dict, storage_writer=StorageWriter("checkpoints/latest"))
    dcp.load(state_dict, storage_reader=StorageReader("checkpoints/latest"))

One path is one checkpoint: saving there again replaces it atomically, and a reader gets the old one
or the new one, whole. ``StorageReader`` also reads the checkpoints that a run of everstep saved.
Uneven tensor-parallel sizes need the two planners: see ``dcp_planner``.

Exchanges between ranks are DCP's: give ``dcp.async_save`` a ``process_group`` of its own
(``dist.new_group(backend="gloo")``), since its background collectives collide with those of FSDP on
the default one.
"""

from everstep.checkpoint.views.dcp_planner import LoadPlanner, SavePlanner
from everstep.checkpoint.views.dcp_reader import StorageReader
from everstep.checkpoint.views.dcp_writer import StorageWriter

__all__ = ["LoadPlanner", "SavePlanner", "StorageReader", "StorageWriter"]
