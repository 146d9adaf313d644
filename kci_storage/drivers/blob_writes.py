"""Writing small objects to Azure Blob Storage: one Put Blob each, without the SDK (:mod:`.blob_http` says why)."""

from __future__ import annotations

import itertools
import random
import secrets
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from urllib.parse import quote, urlencode

from kci_storage.drivers import blob_errors
from kci_storage.drivers.base import Expectation
from kci_storage.drivers.blob_errors import Unanswered, nonsense, refusal
from kci_storage.drivers.blob_http import Answer, Pool
from kci_storage.errors import BackendError, PreconditionFailed

LARGEST = 256 * 1024  # bytes of what is small: the socket takes it in one piece


class BlobWrites:
    """Put Blob in one container.

    :param path: the container's, quoted, as in its URL.
    :param signature: gives the query that authorises a write, now; it is a secret.
    :param version: of Azure's protocol.
    """

    def __init__(self, pool: Pool, path: str, signature: Callable[[], str], version: str):
        self._pool = pool
        self._path = path
        self._signature = signature
        self._version = version

    def put(self, key: str, body: bytes, headers: Mapping[str, str]) -> tuple[str, int]:
        """Make a body an object's content, tried again as long as that is of use, a few times.

        :returns: its ETag, and when it was modified, in seconds since the epoch.
        :raises PreconditionFailed: something else is there than the headers say; it may be what an earlier try has
            stored, whose answer was lost.
        :raises BackendError: the backend failed, or nobody knows.
        """
        for tried in itertools.count():
            last = tried == blob_errors.RETRIES
            try:
                answer = self._put_once(key, body, headers)
            except Unanswered as exc:
                if last:
                    raise BackendError(exc.message, detail=exc.detail) from None
            else:
                answer.discard()
                if answer.status == 201:
                    return _stored(answer)
                if answer.status not in blob_errors.WORTH_ANOTHER_TRY or last:
                    raise _refusal(answer)
            time.sleep(blob_errors.RETRY_WAIT * random.uniform(0.5, 1.5))
        raise AssertionError("unreachable")

    def _put_once(self, key: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        own = {
            "x-ms-version": self._version,
            "x-ms-client-request-id": secrets.token_hex(16),
            "x-ms-blob-type": "BlockBlob",
            "Content-Length": str(len(body)),
        }
        target = f"{self._path}/{quote(key, safe='~/')}?{self._signature()}"
        return self._pool.ask("PUT", target, {**own, **headers}, body)


def properties(
    content_type: str, md5: bytes | None, metadata: Mapping[str, str], tags: Mapping[str, str] | None
) -> dict[str, str]:
    """An object's properties as headers.

    >>> properties("text/plain", b"0", {"a": "b"}, {"c": "d e"})["x-ms-tags"]
    'c=d+e'
    """
    headers = {"x-ms-blob-content-type": content_type}
    headers |= {f"x-ms-meta-{name}": value for name, value in metadata.items()}
    if md5 is not None:
        headers["x-ms-blob-content-md5"] = b64encode(md5).decode()
    if tags:
        headers["x-ms-tags"] = urlencode(tags)
    return headers


def condition(expected: str | Expectation) -> dict[str, str]:
    """What must be there, as headers. A star, quoted or not, would match any, and is in no ETag.

    >>> condition("0x1"), condition(Expectation.NOTHING), condition(Expectation.ANYTHING)
    ({'If-Match': '"0x1"'}, {'If-None-Match': '*'}, {})
    """
    if expected is Expectation.ANYTHING:
        return {}
    if isinstance(expected, Expectation):
        return {"If-None-Match": "*"}
    return {"If-Match": '"{}"'.format(expected.replace("*", "-"))}


def _stored(answer: Answer) -> tuple[str, int]:
    try:
        modified = parsedate_to_datetime(answer.headers["last-modified"])
        return answer.headers["etag"].strip('"'), int(modified.timestamp())
    except (KeyError, ValueError) as exc:
        raise nonsense(repr(exc)) from exc


def _refusal(answer: Answer) -> Exception:
    code = answer.headers.get("x-ms-error-code", "")
    detail = f"{answer.status} {code}, request {answer.headers.get('x-ms-request-id')}"
    unmet = PreconditionFailed("the stored version is not the expected one")
    return refusal(answer.status, code, detail, answer.headers.get("retry-after"), unmet)
