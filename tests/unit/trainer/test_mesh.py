"""What ``build_mesh`` refuses before it needs any process group."""

import pytest

from everstep.trainer.errors import ConfigError
from everstep.trainer.mesh import build_mesh
from everstep.trainer.mesh_shape import MeshShape


def test_pipeline_stages_are_not_built_yet() -> None:
    with pytest.raises(ConfigError, match=r"mesh\.pp=2 is not built yet"):
        build_mesh(MeshShape(pp=2), "cpu")
