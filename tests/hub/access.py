"""Users and what they may do, and signed URLs."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode

from hub.answers import Call, Refusal, StorageRefusal
from hub.repos import Repo


@dataclass(frozen=True)
class User:
    name: str
    token: str
    role: str = "write"
    orgs: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.orgs


class Users:
    """Users by their tokens."""

    def __init__(self) -> None:
        self._by_token: dict[str, User] = {}

    def add(self, user: User) -> None:
        if user.role not in {"read", "write"}:
            raise ValueError(f"unknown role {user.role!r}")
        self._by_token[user.token] = user

    def of(self, call: Call) -> User | None:
        """Who calls; None without a token."""
        header = call.headers.get("Authorization")
        if header is None:
            return None
        user = self._by_token.get(header.removeprefix("Bearer ").strip())
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user


def no_such_repo(user: User | None) -> Refusal:
    """Nobody learns from it whether a repository is private or missing."""
    if user is None:
        return Refusal(401, "Invalid username or password.", code="RepoNotFound")
    return Refusal(404, "Repository not found", code="RepoNotFound")


def check_read(repo: Repo | None, user: User | None) -> Repo:
    """The repository, if the user may see that it is there."""
    if repo is None or (repo.private and not (user is not None and user.owns(repo.namespace))):
        raise no_such_repo(user)
    return repo


def check_namespace(namespace: str, user: User | None, what: str) -> User:
    """The user, if it may write in that namespace."""
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    if user.role != "write":
        raise Refusal(403, f"You must use a token with write permission to {what}.")
    if not user.owns(namespace):
        raise Refusal(403, f'You don\'t have the rights to {what} under the namespace "{namespace}"')
    return user


def check_gate(repo: Repo, user: User | None) -> None:
    """Whether the user may read files of a gated repository."""
    if not repo.gated or (user is not None and (user.owns(repo.namespace) or user.name in repo.granted)):
        return
    if user is None:
        message = f"Access to dataset {repo.id} is restricted. You must have access to it and be authenticated."
        raise Refusal(401, message, code="GatedRepo")
    message = f"Access to dataset {repo.id} is restricted and you are not in the authorized list."
    raise Refusal(403, message, code="GatedRepo")


class Signer:
    """Signs URLs of the storage. A URL signed for reading does not write."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(16)

    def expire_all(self) -> None:
        self._secret = secrets.token_bytes(16)

    def _signature(self, verb: str, path: str, fields: list[tuple[str, str]]) -> str:
        text = f"{verb}\n{path}\n{urlencode(sorted(fields))}"
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()

    def sign(self, verb: str, path: str, lifetime: float, **fields: str) -> str:
        """The path with its query."""
        pairs = [*fields.items(), ("Expires", str(int(time.time() + lifetime)))]
        return f"{path}?{urlencode([*pairs, ('Signature', self._signature(verb, path, pairs))])}"

    def check(self, verb: str, call: Call) -> None:
        pairs = parse_qsl(call.query, keep_blank_values=True)
        given = dict(pairs)
        signed = [pair for pair in pairs if pair[0] != "Signature"]
        if not hmac.compare_digest(self._signature(verb, call.path, signed), given.get("Signature", "")):
            raise StorageRefusal(403, "The signature does not match.", code="SignatureDoesNotMatch")
        if time.time() >= int(given["Expires"]):
            raise StorageRefusal(403, "Request has expired", code="AccessDenied")
