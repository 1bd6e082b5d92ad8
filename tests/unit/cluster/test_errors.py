import pickle

import pytest

from everstep.checkpoint.errors import EverstepError
from everstep.cluster.errors import (
    LaunchError,
    PortTakenError,
    RankEnvironmentError,
    RunDirError,
)


@pytest.mark.parametrize(
    "error",
    [
        LaunchError("no process can be started"),
        PortTakenError(80, "Permission denied"),
        RunDirError("/x", "No space left on device"),
        RankEnvironmentError("RANK", None),
    ],
)
def test_errors_are_one_sentence_and_survive_pickling(error: EverstepError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert copy.args == error.args
    assert str(copy) == str(error)
    assert "\n" not in str(error)
