"""Where the ranks of one host meet: a TCPStore in a process of its own, never in a rank.

The controller binds the port itself, long before torch is imported anywhere: a port that is taken
shows at once. It listens on the loopback interface only. The store's process is forked, like a
rank, from the process that has torch imported already; so the controller never imports it.
"""

import socket
import time
from datetime import timedelta

from everstep.cluster.errors import PortTakenError
from everstep.trainer.rank_spec import Reporter, StopRequested

LOOPBACK = "127.0.0.1"
_POLL_S = 0.2


def listen(port: int) -> socket.socket:
    """A listening socket on the loopback interface; port 0 takes any free one.

    Raises PortTakenError.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, port))
        listener.listen(4096)
    except OSError as error:
        listener.close()
        raise PortTakenError(port, error.strerror or str(error)) from None
    return listener


def serve(listener: socket.socket, report: Reporter, should_stop: StopRequested) -> int:
    """Serve a TCPStore on ``listener`` until asked to stop. Runs in a process of its own."""
    import torch.distributed as dist

    host, port = listener.getsockname()
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=60),
        master_listen_fd=listener.detach(),
    )
    report({"kind": "serving", "store": f"{host}:{store.port}"})
    while not should_stop():
        time.sleep(_POLL_S)
    return 0
