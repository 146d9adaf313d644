# SPDX-License-Identifier: LGPL-2.1-or-later
"""The worker: a process that accepts connections and answers their requests.

- A connection uses a thread only while its request is answered. The main loop collects the request's head
  (:class:`~kci_storage.net.connection.Connection`). The background sender sends the rest of a file to a slow reader
  (:class:`~kci_storage.net.background.Sending`), and closes connections. A thread that waits for a slow client
  releases its slot (:class:`~kci_storage.net.threads.Threads`).
- Clients that send their next request at once share a thread (:class:`~kci_storage.net.fast_loop.FastLoop`).
- A client without progress for ``send_timeout`` seconds is dropped. A slow client is served, unless there are too
  many of them (:class:`~kci_storage.net.client_socket.Pace`).
- A connection is accepted only while a thread is free, since another worker may have a free one, and only while the
  worker may have one more connection.
- A failure costs the connection that it concerns, and nothing else: slots, loops and threads go on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from kci_storage import logfmt
from kci_storage.config.settings import ConfigError
from kci_storage.net import fast_loop
from kci_storage.net.acceptor import Acceptor
from kci_storage.net.background import Background, Sending
from kci_storage.net.client_socket import ClientSocket
from kci_storage.net.connection import Connection
from kci_storage.net.fast_loop import FastLoop
from kci_storage.net.mailbox import Mailbox
from kci_storage.net.threads import Threads
from kci_storage.net.tls import TlsSocket
from kci_storage.net.waiting import Waiting
from kci_storage.server import gunicorn_parts
from kci_storage.server.refusals import refusal
from kci_storage.server.request import Requests

log = logging.getLogger(__name__)

HEAD_SECONDS = 10.0  # from a request's first byte until its head must be there
MAX_HEAD_SIZE = 64 * 1024  # bytes
TURN_SECONDS = 1.0  # the longest turn of the main loop
IDLE_SECONDS = 1.0  # after which an idle connection may be closed to make room for a new client
STOP_SECONDS = 2.0  # for which a stopping worker waits for requests that may be on their way
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGABRT)

Step = Callable[..., object]  # of the main loop; its first argument is the connection that it is for


class Worker(gunicorn_parts.Worker):
    """The worker class of this server."""

    send_timeout = 60.0  # seconds; the master sets this and the next before it forks workers
    connections = 1000  # how many it may have, including those that are being closed
    number: int  # unique among the master's running workers
    tls: ssl.SSLContext | None = None  # for new connections; set by the master, and when it is reloaded
    unusable = (ConfigError,)

    def begin(self) -> None:
        """Create the resources that must not be shared with the parent process."""
        self._calls: Mailbox[tuple[Connection, Step]] = Mailbox()  # steps that other threads leave for the main loop
        self._threads = Threads(self.settings.threads, changed=self._calls.wake)
        self._background = Background()
        self._requests = Requests(self.settings, lambda: self.application, self._may_keep)
        self._fast_loop = FastLoop(
            self.connections // 2,
            self._threads,
            answer=self._requests.answer,
            done=self._hand_back,
            is_stopping=lambda: self.is_stopping,
            started=self._calls.wake,
        )
        self._acceptor = Acceptor(self._drop_oldest_idle)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._calls, selectors.EVENT_READ, self._take_calls)
        self._accepts = False  # whether the listeners are registered in the selector
        # Each connection is in the first of these, and in one of the others.
        self._connections: set[Connection] = set()
        self._keepalive: float = self.settings.keepalive  # seconds; cached, since it is needed for each request
        self._idle = Waiting(self._keepalive)  # no byte of a request has come
        self._heads = Waiting(min(HEAD_SECONDS, self.send_timeout))  # a part of the head has come
        self._ready: deque[Connection] = deque()  # the head has come, and waits for a thread
        self._working: set[Connection] = set()  # a thread answers the request
        self._sending: set[Connection] = set()  # the background sender sends the rest of a response
        self._lingering: set[Connection] = set()  # the background sender closes it
        self._shed_at = 0.0  # on the monotonic clock
        for listener in self.listeners:
            self._set_user_timeout(listener)

    def _set_user_timeout(self, listener: Any) -> None:
        """Let the kernel drop clients that vanish without closing the connection; accepted sockets inherit this."""
        if listener.family in (socket.AF_INET, socket.AF_INET6):
            milliseconds = int(self.send_timeout * 1000)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    def handle_signals(self) -> None:
        """Let signals wake the main loop; those since the fork are delivered here."""
        signal.set_wakeup_fd(self._calls.writer, warn_on_full_buffer=False)
        release_signals()

    # The main loop

    def serve(self) -> None:
        """Answer requests until a signal stops the worker or the master is gone; then finish the running ones."""
        while not self.is_stopping and os.getppid() == self.master:
            self._turn()
        self._stop()

    def _turn(self, accepting: bool = True) -> None:
        """One turn of the loop. An exception in it does not end the loop."""
        try:
            self._do_turn(accepting)
        except Exception:
            log.exception("event=main_loop_failed")
            time.sleep(fast_loop.RETRY_SECONDS)  # it may fail again at once

    def _do_turn(self, accepting: bool) -> None:
        """Accept, collect, dispatch, expire, shed, look.

        Requests are dispatched only if a thread was free at the turn's beginning; the others stay in ``_ready``. So
        whenever a thread becomes free, new connections are accepted before requests are dispatched.
        """
        self.beat()
        now = time.monotonic()
        has_thread = self._has_free_thread()
        self._listen(accepting and has_thread and self._has_room(now) and now >= self._acceptor.paused_until)
        for key, _ in self._selector.select(self._seconds_to_wait(now, has_thread)):
            key.data(key.fileobj)  # accepts a connection, collects a head, or takes other threads' calls
        if has_thread:
            self._dispatch()
        now = time.monotonic()
        self._expire(now)
        self._shed(now)
        self._fast_loop.look(now)

    def _seconds_to_wait(self, now: float, has_thread: bool) -> float:
        if has_thread and self._ready:
            return 0.0
        seconds = TURN_SECONDS
        if self._fast_loop.is_running or not has_thread:  # waits may have lasted long enough to release slots by then
            seconds = fast_loop.LOOK_SECONDS
        if now < self._acceptor.paused_until:
            seconds = min(seconds, self._acceptor.paused_until - now)
        if self.is_stopping and (oldest := self._idle.oldest()) is not None:
            seconds = min(seconds, oldest.deadline - now)
        return max(0.0, seconds)

    def _stop(self) -> None:
        """Finish the running requests, and answer the connections in the listeners' backlog.

        The listeners are closed first, so that new clients are refused rather than left waiting, and a load balancer
        uses another server at once.
        """
        self._listen(False)
        for listener in self.listeners:
            while len(self._connections) < self.connections and self._accept(listener):
                pass
            listener.close()
        self._idle.shorten(STOP_SECONDS)
        deadline = time.monotonic() + self.settings.graceful_timeout
        while len(self._connections) > len(self._lingering) and time.monotonic() < deadline:
            self._turn(accepting=False)

    def _may_keep(self) -> bool:
        return self._keepalive > 0 and not self.is_stopping

    # Accept

    def _has_free_thread(self) -> bool:
        """Whether a slot is free."""
        at_work = len(self._working) - self._threads.released_slots - self._fast_loop.threads_saved
        return at_work < self._threads.size

    def _has_room(self, now: float) -> bool:
        """Whether there may be one more connection, if necessary after closing an idle one."""
        return len(self._connections) < self.connections or self._idle.oldest_age(now) >= IDLE_SECONDS

    def _listen(self, accepts: bool) -> None:
        if accepts == self._accepts:
            return
        self._accepts = accepts
        for listener in self.listeners:
            if accepts:
                listener.setblocking(False)
                self._selector.register(listener, selectors.EVENT_READ, self._accept)
            else:
                self._selector.unregister(listener)

    def _accept(self, listener: Any) -> bool:
        """Accept a connection; whether there was one."""
        accepted = self._acceptor.accept(listener)
        if accepted is None:
            return False
        if len(self._connections) >= self.connections:
            self._drop_oldest_idle()
        try:
            client = self._client_socket(accepted[0])
            conn = Connection(client, accepted[1], listener.getsockname(), self._background)
        except Exception:
            log.exception("event=accept_failed")
            accepted[0].close()
            return True
        self._connections.add(conn)
        self._try(conn, self._await_request)
        return True

    def _client_socket(self, sock: socket.socket) -> ClientSocket:
        if self.tls is None:
            return ClientSocket(sock, self.send_timeout, self._threads)
        return TlsSocket(self.tls, sock, self.send_timeout, self._threads)

    def _drop_oldest_idle(self) -> None:
        if (oldest := self._idle.oldest()) is not None:
            self._drop(oldest)

    # Collect

    def _await_request(self, conn: Connection) -> None:
        """Collect the next request's head, of which a part may have come already."""
        if conn.sock.has_more:
            conn.receive()
        if conn.has_begun and conn.has_head:
            self._ready.append(conn)
            return
        (self._heads if conn.has_begun else self._idle).add(conn)
        self._selector.register(conn.sock, selectors.EVENT_READ, partial(self._on_readable, conn))

    def _on_readable(self, conn: Connection, _: Any) -> None:
        if conn in self._idle or conn in self._heads:  # else it was dropped while the event was on its way
            self._try(conn, self._collect)

    def _collect(self, conn: Connection) -> None:
        """Receive what has come on a waiting connection."""
        if not conn.receive():
            self._drop_or_explain(conn)
        elif conn.has_head:
            self._stop_waiting(conn)
            self._ready.append(conn)
        elif len(conn.head) > MAX_HEAD_SIZE:
            self._refuse(conn, 431)
        elif conn in self._idle and conn.has_begun:
            self._idle.discard(conn)
            self._heads.add(conn)
        elif conn in self._heads and not conn.has_begun:  # the TLS handshake is over; now it may be idle
            self._heads.discard(conn)
            self._idle.add(conn)

    def _drop_or_explain(self, conn: Connection) -> None:
        if conn.sock.received_plain_http:
            self._refuse(conn, 400, "this port speaks HTTPS")
        else:
            self._drop(conn)

    def _stop_waiting(self, conn: Connection) -> None:
        self._selector.unregister(conn.sock)
        self._idle.discard(conn)
        self._heads.discard(conn)

    def _drop(self, conn: Connection) -> None:
        """Close a waiting connection."""
        self._stop_waiting(conn)
        self._connections.discard(conn)
        conn.close()

    def _refuse(self, conn: Connection, status: int, text: str = "") -> None:
        """Refuse a request whose head is incomplete, and close the connection."""
        self._stop_waiting(conn)
        answer = refusal(status, conn.client, text=text, head=conn.head)
        with contextlib.suppress(OSError):  # also if the kernel accepts no data: the main loop never waits
            conn.sock.answer_now(answer)
        self._linger(conn)

    # Dispatch

    def _dispatch(self) -> None:
        """Let threads answer the requests whose head has come."""
        while self._ready and self._has_free_thread():
            conn = self._ready.popleft()
            self._working.add(conn)
            self._threads.submit(partial(self._fast_loop.serve, conn))

    def _hand_back(self, conn: Connection) -> None:
        """Called by any thread that is done with a connection."""
        self._calls.put((conn, self._answered))

    def _take_calls(self, _: Any) -> None:
        for conn, step in self._calls.take():
            self._try(conn, step)

    def _answered(self, conn: Connection) -> None:
        """A thread has answered the connection's request."""
        self._working.discard(conn)
        if conn.sock.rest is not None:
            self._sending.add(conn)
            self._background.add(Sending(conn.sock, self.send_timeout, conn.request_id, partial(self._sent, conn)))
        else:
            self._go_on(conn)

    def _sent(self, conn: Connection, complete: bool) -> None:
        """Called by the background thread: the rest of a response has been sent, or never will be."""
        conn.keep = conn.keep and complete
        self._calls.put((conn, self._end_sending))

    def _end_sending(self, conn: Connection) -> None:
        self._sending.discard(conn)
        self._go_on(conn)

    def _go_on(self, conn: Connection) -> None:
        if conn.keep:
            self._await_request(conn)
        else:
            self._linger(conn)

    def _linger(self, conn: Connection) -> None:
        """Close a connection in the background, so that its client gets all data that was sent."""
        self._lingering.add(conn)
        if not conn.linger(closed=lambda: self._calls.put((conn, self._forget))):
            self._forget(conn)

    def _forget(self, conn: Connection) -> None:
        self._lingering.discard(conn)
        self._connections.discard(conn)

    # Expire, shed

    def _expire(self, now: float) -> None:
        """Close connections whose deadline has passed."""
        for conn in self._idle.expired(now):
            self._try(conn, self._drop)
        for conn in self._heads.expired(now):
            self._try(conn, partial(self._refuse, status=408))

    def _shed(self, now: float) -> None:
        """Shed the slowest clients, if threads or connections are scarce."""
        if now < self._shed_at or not (self._threads.is_crowded or not self._has_room(now)):
            return
        self._shed_at = now + 1
        for sock in (*self._threads.waited_for(), *(conn.sock for conn in self._sending)):
            if sock.is_behind():
                sock.give_up()

    # Failures

    def _try(self, conn: Connection, step: Step) -> None:
        """Take a step for a connection; if it fails, only this connection is closed."""
        try:
            step(conn)
        except Exception:
            log.exception(logfmt.line(event="connection_failed", request_id=conn.request_id or None))
            self._abandon(conn)

    def _abandon(self, conn: Connection) -> None:
        with contextlib.suppress(KeyError, ValueError, OSError):
            self._selector.unregister(conn.sock)
        for waiting in (self._idle, self._heads, self._working, self._sending, self._lingering, self._connections):
            waiting.discard(conn)
        with contextlib.suppress(ValueError):
            self._ready.remove(conn)
        with contextlib.suppress(OSError):
            conn.sock.close()


def hold_signals() -> None:
    """Block the signals that end a process; a process that is forked meanwhile inherits this."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)


def release_signals() -> None:
    """Unblock the signals; those that came meanwhile are delivered."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
