# SPDX-License-Identifier: LGPL-2.1-or-later
"""The outcome of a change that took several tries, when the answer to one of them was lost.

A request whose answer was lost may have been carried out, or the service may still carry it out. Since each try of a
change has the same condition, it is carried out once at most. But a later try that is refused by its condition
proves nothing: an earlier one may have been carried out, and its result replaced.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime

from kci_storage.errors import (
    BackendError,
    BackendTimeout,
    ObjectNotFound,
    OutcomeUnknown,
    OutcomeUnknownTimeout,
    PreconditionFailed,
)

SERVICE_TIMEOUT = 60  # seconds that the service may take for a change, beside those for its body
SLOWEST_BODY = 64 * 1024  # bytes a second of a request's body
CLOCK_SECONDS = 5  # by which the clocks of the service's machines may differ; its times are whole seconds


def service_timeout(size: int) -> int:
    """After how many seconds the service gives up a request, if it is told so (``timeout`` in the query).

    Without that it would take up to 10 minutes for each MiB of a Put Blob.

    :param size: of the body, in bytes.
    """
    return SERVICE_TIMEOUT + size // SLOWEST_BODY


class LostAnswers:
    """The requests of one change whose answer was lost."""

    def __init__(self) -> None:
        self._lands_until = 0.0  # seconds since the epoch
        self._timeout = 0.0  # seconds
        self._began: float | None = None  # when the first request was sent, on the monotonic clock
        self.noted_last = False  # whether the answer to the last request was lost

    def __bool__(self) -> bool:
        return self._lands_until > 0

    def sending(self, size: int) -> None:
        """A request is about to be sent.

        :param size: of its body, in bytes.
        """
        self._timeout = service_timeout(size)
        if self._began is None:
            self._began = time.monotonic()
        self.noted_last = False

    def note(self) -> None:
        """Its answer was lost, just now."""
        self._lands_until = time.time() + self._timeout
        self.noted_last = True

    def forget_if_older(self, headers: Mapping[str, str]) -> None:
        """Forget them if the stored version is older than all of them, and so has been stored all the time.

        They required another version, or none, so none of them was carried out.

        :param headers: of an answer about the stored version, with names in lower case.
        """
        with contextlib.suppress(KeyError, ValueError):
            now, modified = (parsedate_to_datetime(headers[name]).timestamp() for name in ("date", "last-modified"))
            if self._began is not None and modified + CLOCK_SECONDS < now - (time.monotonic() - self._began):
                self._lands_until = 0.0

    def unknown(self, error: Exception, *, replaced: bool = False) -> OutcomeUnknown:
        """The error for the whole change.

        :param error: of its last try.
        :param replaced: whether the version that it requires is gone for good, so that it cannot be carried out now.
        """
        kind = OutcomeUnknownTimeout if isinstance(error, BackendTimeout) else OutcomeUnknown
        detail = getattr(error, "detail", None) or repr(error)
        lands_until = 0.0 if replaced else self._lands_until
        message = "the backend did not confirm the change: it may have been made, or not; look before you try again"
        return kind(message, detail=detail, lands_until=lands_until)


@contextlib.contextmanager
def certain(lost: LostAnswers, expected: str | None) -> Iterator[None]:
    """Replace an error by :class:`OutcomeUnknown` unless it is certain that nothing was changed.

    :param expected: the ETag that the change requires; None: it requires that there is no object, which may become
        true again by a deletion.
    """
    try:
        yield
    except (ObjectNotFound, PreconditionFailed) as exc:
        if lost:
            raise lost.unknown(exc, replaced=expected is not None) from exc
        raise
    except BackendError as exc:
        if lost:
            raise lost.unknown(exc) from exc
        raise
