"""Buckets on this machine: real servers of S3 and of Google Cloud Storage, each a process."""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def running(*command: str) -> Iterator[str]:
    """Run `python -m COMMAND`, with PORT for a free port, until it answers; yield its address."""
    port = str(free_port())
    words = [word.replace("PORT", port) for word in command]
    server = subprocess.Popen(
        [sys.executable, "-m", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    try:
        while True:
            assert server.poll() is None, command
            assert time.monotonic() < deadline, command
            try:
                urllib.request.urlopen(address).close()
                break
            except OSError:
                time.sleep(0.05)
        yield address
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Yield the environment variables that lead to an empty S3."""
    with running("moto.server", "-H", "127.0.0.1", "-p", "PORT") as address:
        yield {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@contextlib.contextmanager
def gs_server(bucket: str) -> Iterator[dict[str, str]]:
    """Yield the environment variables that lead to a Google Cloud Storage of one empty bucket."""
    command = "gcp_storage_emulator start --host 127.0.0.1 --port PORT --in-memory"
    with running(*command.split(), "--default-bucket", bucket) as address:
        # The kind of a bucket is asked of a service that the emulator lacks.
        yield {"STORAGE_EMULATOR_HOST": address, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
