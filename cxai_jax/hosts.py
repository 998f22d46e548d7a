"""Hosts of one run watch each other: where one is lost, all end soon, with one line.

JAX's own service takes 100 s to miss a host, and then aborts the others with a stack
trace. Here process 0 holds a connection to every other process: the kernel closes it
at once when a process is killed, and a host that is cut off falls silent. Whoever
learns of it tells the others and ends.
"""

import contextlib
import inspect
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax

PLACE = "cxai_jax/watch"  # Where process 0 says how it is reached.
BEATS = 4  # Signs of life per timeout.
CONNECT_S = 300  # As long as JAX itself waits for all processes.
LOST = 1  # Exit code.


@contextlib.contextmanager
def joined(
    coordinator: str | None,
    number: int | None,
    process: int | None,
    *,
    timeout_s: float,
) -> Iterator[None]:
    """Joins the processes of a multi-host run, before the first device is touched.

    Args:
      coordinator: HOST:PORT of process 0; None with the next two where Slurm or the
        TPU pod tells of all three.
      number: of processes.
      process: of this one, from 0.
      timeout_s: seconds of silence after which a host counts as lost.
    """
    # Later than ours, which says more; not every version of JAX can be told.
    wanted = {
        "heartbeat_timeout_seconds": int(max(100, 2 * timeout_s)),
        "shutdown_timeout_seconds": int(max(30, timeout_s)),
    }
    known = inspect.signature(jax.distributed.initialize).parameters
    wanted = {name: value for name, value in wanted.items() if name in known}
    jax.distributed.initialize(coordinator, number, process, **wanted)
    from jax._src.distributed import global_state as service  # There is no other way.

    host = service.coordinator_address.rpartition(":")[0].strip("[]")
    watch = Watch(
        service.process_id,
        service.num_processes,
        host,
        publish=lambda text: service.client.key_value_set(PLACE, text),
        lookup=lambda: service.client.blocking_key_value_get(PLACE, CONNECT_S * 1000),
        timeout_s=timeout_s,
    )
    try:
        yield
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            # A collective fails where another process is gone: most often the watch
            # says so, and ends this one, before the time is over.
            time.sleep(0 if "RESOURCE_EXHAUSTED" in str(error) else timeout_s)
        watch.end("")  # The others would wait for this process.
        raise
    watch.end("bye")


class Watch:
    """Connections between process 0 and all others, and what is said over them.

    Lines are "alive", "bye" of a process that has ended in order, and "lost N".
    """

    def __init__(
        self,
        process: int,
        number: int,
        host: str,
        *,
        publish: Callable[[str], None],
        lookup: Callable[[], str],
        timeout_s: float,
        lose: Callable[[int], None] | None = None,
    ):
        """Connects to the others; `host` is where process 0 is.

        `lose(process)` is called where one is lost; the default ends this one.
        """
        self._process, self._number, self._timeout = process, number, timeout_s
        self._lose = lose or self._exit
        self._over, self._lock = threading.Event(), threading.Lock()
        self._peers: dict[int, socket.socket] = {}
        if process == 0:
            self._meet(publish)
        else:
            port, token = lookup().split()
            peer = socket.create_connection((host, int(port)), CONNECT_S)
            peer.sendall(f"{token} {process}\n".encode())
            self._peers[0] = peer
        for peer in self._peers.items():
            threading.Thread(target=self._listen, args=peer, daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def _meet(self, publish) -> None:
        """Process 0 waits for the others; whoever lacks the token is turned away."""
        token = secrets.token_hex(16)
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        with socket.create_server(
            ("", 0), family=family, dualstack_ipv6=family == socket.AF_INET6
        ) as server:
            server.settimeout(CONNECT_S)
            publish(f"{server.getsockname()[1]} {token}")
            while len(self._peers) < self._number - 1:
                peer, _ = server.accept()
                peer.settimeout(10)
                with contextlib.suppress(OSError, ValueError):
                    said, other = _line(peer).split()
                    if secrets.compare_digest(said, token):
                        self._peers[int(other)] = peer
                        continue
                peer.close()

    def _listen(self, other: int, peer: socket.socket) -> None:
        peer.settimeout(self._timeout)
        while not self._over.is_set():
            try:
                said = _line(peer)
            except (OSError, ValueError):  # Silent for too long, or cut off.
                said = f"lost {other}"
            if said == "bye":
                return
            if said.startswith("lost"):
                self._ended(int(said.split()[1]))
                return

    def _beat(self) -> None:
        while not self._over.wait(self._timeout / BEATS):
            self._tell("alive")

    def _tell(self, text: str) -> None:
        with self._lock:
            for peer in self._peers.values():
                with contextlib.suppress(OSError):
                    peer.sendall(f"{text}\n".encode())

    def _ended(self, process: int) -> None:
        with self._lock:
            if self._over.is_set():
                return
            self._over.set()
        if self._process == 0:
            self._tell(f"lost {process}")
        self._lose(process)

    def _exit(self, process: int) -> None:
        told = (
            f"error: process {process} of {self._number} is gone (process 0 is the "
            "coordinator); start all of them again: the same command continues\n"
        )
        # The main thread may be inside a collective that never ends.
        os.write(sys.stderr.fileno(), told.encode())
        os._exit(LOST)

    def end(self, text: str) -> None:
        """Leaves; with "bye" in order, with "" as one that is lost."""
        self._over.set()
        if text:
            self._tell(text)
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_WR if text else socket.SHUT_RDWR)


def _line(peer: socket.socket) -> str:
    """The next line of a connection; raises OSError at its end."""
    read = bytearray()
    while not read.endswith(b"\n"):
        byte = peer.recv(1)
        if not byte:
            raise ConnectionError("closed")
        read += byte
        if len(read) > 200:
            raise ValueError("not a line of ours")
    return read.decode().strip()
