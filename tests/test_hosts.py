"""Processes that watch each other: of a lost one all learn, of an orderly end none."""

import queue
import socket
import threading

import pytest

from cxai_jax.hosts import Watch

WAIT_S = 60


class Group:
    """`number` watches in threads, and what each of them lost."""

    def __init__(self, number, timeout_s=30.0):
        self.lost = [queue.Queue() for _ in range(number)]
        place = queue.Queue()
        self.watches = [None] * number

        def join(process):
            def lookup():
                text = place.get()
                place.put(text)
                return text

            self.watches[process] = Watch(
                process,
                number,
                "localhost",
                publish=place.put,
                lookup=lookup,
                timeout_s=timeout_s,
                lose=self.lost[process].put,
            )

        threads = [threading.Thread(target=join, args=(i,)) for i in range(number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert all(self.watches)
        self.place = place.get()

    def end(self):
        for watch in self.watches:
            watch.end("bye")


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_all_others_learn_who_is_lost(victim):
    group = Group(3)
    for peer in group.watches[victim]._peers.values():  # As the kernel does.
        group.watches[victim]._over.set()
        peer.shutdown(socket.SHUT_RDWR)
    for process in {0, 1, 2} - {victim}:
        assert group.lost[process].get(timeout=WAIT_S) == victim
    group.end()


def test_a_silent_process_is_lost():
    group = Group(2, timeout_s=0.5)
    group.watches[1]._tell = lambda text: None
    assert group.lost[0].get(timeout=WAIT_S) == 1
    group.end()


def test_who_ends_in_order_is_not_lost():
    group = Group(3, timeout_s=0.5)
    group.watches[1].end("bye")
    with pytest.raises(queue.Empty):
        group.lost[0].get(timeout=2.0)  # Four timeouts of the others' silence.
    group.end()
    assert all(lost.empty() for lost in group.lost)


def test_strangers_are_turned_away():
    place, found = queue.Queue(), []

    def meet():
        found.append(
            Watch(0, 2, "", publish=place.put, lookup=None, timeout_s=30, lose=print)
        )

    thread = threading.Thread(target=meet)
    thread.start()
    port, token = place.get(timeout=WAIT_S).split()
    for said in (b"x 1\n", b"\xff\xff\n", b"y" * 300, b""):
        with socket.create_connection(("localhost", int(port))) as stranger:
            stranger.sendall(said)
    with socket.create_connection(("localhost", int(port))) as friend:
        friend.sendall(f"{token} 1\n".encode())
        thread.join(WAIT_S)
        assert list(found[0]._peers) == [1]
        found[0].end("bye")
