"""A real S3 server process (moto's), one per test session."""

import contextlib
import itertools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_ADDRESS = re.compile(rb"Running on (http://127\.0\.0\.1:\d+)")


@dataclass(frozen=True)
class S3Server:
    """A running server; every bucket is new."""

    endpoint: str
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    @property
    def options(self) -> dict[str, Any]:
        """For fsspec."""
        return {
            "key": "testing",
            "secret": "testing",
            "endpoint_url": self.endpoint,
            "client_kwargs": {"region_name": "eu-west-1"},
        }

    def new_url(self) -> str:
        """A folder in a new bucket."""
        import fsspec

        bucket = f"bucket-{os.getpid()}-{next(self._numbers)}"
        fsspec.filesystem("s3", use_listings_cache=False, **self.options).mkdir(bucket)
        return f"s3://{bucket}/runs/one"


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """Starts the server, ends it and waits for its end."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=_environment()
    ) as process:
        assert process.stderr is not None
        drain = threading.Thread(target=process.stderr.read, daemon=True)
        try:
            seen = []
            for line in process.stderr:
                seen.append(line)
                if match := _ADDRESS.search(line):
                    break
            else:
                raise AssertionError(f"the S3 server did not start: {b''.join(seen).decode()}")
            drain.start()  # its log of requests would fill the pipe
            yield S3Server(match[1].decode())
        finally:
            process.kill()
            process.wait()
            if drain.is_alive():
                drain.join()


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE")}
