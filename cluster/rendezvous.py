"""Where the ranks of a run meet: a TCPStore in a process of its own, never in a rank.

The controller binds the port itself, long before torch is imported anywhere: a port that is taken
shows at once. It listens on one interface only: loopback, unless ranks run on other hosts. The
store's process is a child of the controller, which never imports torch itself.
"""

import socket
import time
from datetime import timedelta

from everstep.cluster.errors import PortTakenError
from everstep.trainer.rank_spec import Reporter, StopRequested

LOOPBACK = "127.0.0.1"
_POLL_S = 0.2


def listen(port: int, address: str = LOOPBACK) -> socket.socket:
    """A listening socket on the interface that has ``address``; port 0 takes any free one.

    Raises PortTakenError.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(4096)
    except OSError as error:
        listener.close()
        raise PortTakenError(port, error.strerror or str(error)) from None
    return listener


def serve(listener: socket.socket, report: Reporter, should_stop: StopRequested) -> int:
    """Serve a TCPStore on ``listener`` until asked to stop. Runs in a process of its own."""
    import torch.distributed as dist

    host, port = listener.getsockname()[:2]
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
