# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tokens (JWT, RFC 7519, signed with HS256): issuing and verifying them. The only module that uses PyJWT."""

from __future__ import annotations

import secrets
import time
import unicodedata
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jwt

from kci_storage.errors import Unauthorized

MAX_HEADER = 8192  # characters; our tokens have about 200
MIN_SECRET_BYTES = 32  # RFC 7518 section 3.2: as long as the hash
SECONDS_PER_DAY = 86400
REMEMBERED = 1_000  # verified tokens in the cache, which is emptied when it is full

_ALGORITHMS = ["HS256"]  # a list: PyJWT searches a plain string for substrings
_OPTIONS: Any = {"verify_aud": False, "verify_iat": False, "verify_sub": False, "verify_jti": False}
_REASONS: dict[type[jwt.PyJWTError], str] = {
    jwt.ExpiredSignatureError: "the token has expired",
    jwt.ImmatureSignatureError: "the token is not yet valid",
    jwt.InvalidAlgorithmError: "the token is not signed with HS256",
}

# PyJWT warns at every use of a short secret. Old installations have one; the server warns once, when it starts.
warnings.filterwarnings("ignore", category=jwt.InsecureKeyLengthWarning)


class _Known(NamedTuple):
    """A token that was verified."""

    email: str
    until: float  # seconds since the epoch: when it expires


class Authenticator:
    """Verifies tokens, each once: a build uploads thousands of files with one.

    :param secrets: tried in this order.
    :param leeway: seconds by which other machines' clocks may be off.
    """

    def __init__(self, secrets: Sequence[str], leeway: float = 30):
        self._secrets = tuple(secrets)
        self._leeway = leeway
        self._known: dict[str, _Known] = {}

    def verify(self, authorization: str | None) -> str:
        """The email of the token's owner.

        :param authorization: the header's value: ``Bearer <token>``, or the bare token.
        :raises Unauthorized: there is no valid token. The reason is in ``detail``, the token never is.
        """
        token = _token(authorization)
        known = self._known.get(token)
        if known is None or time.time() >= known.until:
            known = self._verified(token)
            self._remember(token, known)
        return known.email

    def _remember(self, token: str, known: _Known) -> None:
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        self._known[token] = known

    def _verified(self, token: str) -> _Known:
        claims = self._claims(token)
        return _Known(_email(claims), int(claims["exp"]) + self._leeway if "exp" in claims else float("inf"))

    def _claims(self, token: str) -> dict[str, Any]:
        for secret in self._secrets:
            try:
                return self._decode(token, secret)
            except (jwt.InvalidSignatureError, jwt.InvalidKeyError):
                continue
            except jwt.PyJWTError as exc:
                raise _refusal(_REASONS.get(type(exc), f"malformed token ({type(exc).__name__})")) from exc
        raise _refusal("the token is signed with another secret")

    def _decode(self, token: str, secret: str) -> dict[str, Any]:
        return jwt.decode(token, secret, algorithms=_ALGORITHMS, options=_OPTIONS, leeway=self._leeway)


def issue(email: str, secret: str, expires_days: float | None) -> str:
    """A token for a user.

    :param expires_days: how long it is valid; None: for ever.
    :raises jwt.InvalidKeyError: the secret is not usable, see :func:`check_secret`.
    """
    now = int(time.time())
    claims: dict[str, Any] = {"email": email, "iat": now}
    if expires_days is not None:
        claims["exp"] = now + int(expires_days * SECONDS_PER_DAY)
    return jwt.encode(claims, secret, algorithm="HS256")


def new_secret() -> str:
    """A new random secret: 256 bits, as 64 hexadecimal digits."""
    return secrets.token_hex(MIN_SECRET_BYTES)


def check_secret(secret: str) -> str | None:
    """Why a secret cannot be used at all; None: it can be used.

    PyJWT refuses keys that are empty or look like a public key or a JWK, but only when they are used.

    >>> check_secret("")
    'it is empty'
    """
    if not secret:
        return "it is empty"
    try:
        jwt.encode({}, secret, algorithm="HS256")
    except jwt.InvalidKeyError:
        return "it looks like a public key, a certificate or a JWK, which cannot sign HS256 tokens"
    return None


def is_weak(secret: str) -> bool:
    """Whether a usable secret is shorter than the 32 bytes that RFC 7518 demands for HS256.

    >>> is_weak("short"), is_weak(new_secret())
    (True, False)
    """
    return len(secret.encode()) < MIN_SECRET_BYTES


def _refusal(reason: str) -> Unauthorized:
    return Unauthorized("Unauthorized", detail=reason)


def _token(authorization: str | None) -> str:
    if authorization is None:
        raise _refusal("no Authorization header")
    if len(authorization) > MAX_HEADER:
        raise _refusal(f"an Authorization header of more than {MAX_HEADER} characters")
    words = authorization.split()
    if len(words) == 2 and words[0].lower() == "bearer":
        del words[0]
    if len(words) != 1 or words[0].lower() == "bearer" or not words[0].isascii():
        raise _refusal("the Authorization header is neither 'Bearer <token>' nor a token")
    return words[0]


def _email(claims: dict[str, Any]) -> str:
    email = claims.get("email")
    if not isinstance(email, str) or not email.strip():
        raise _refusal("the token has no claim 'email'")
    if any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in email):
        raise _refusal("the claim 'email' has a control character")
    return email
