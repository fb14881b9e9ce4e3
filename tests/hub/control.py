"""The control API at /_ctl/ of either origin: what the object Hub gives, for other processes."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from hub.answers import Answer, Call, Refusal, as_json
from hub.faults import Fault
from hub.routes import Routes

if TYPE_CHECKING:
    from hub.server import Hub

routes = Routes()

_SETTINGS = (
    "latency",
    "bytes_per_second",
    "url_lifetime",
    "multipart_above",
    "part_size",
    "page_size",
    "quota_bytes",
)


@routes("GET", "/_ctl/log")
def log(hub: Hub, _call: Call) -> Answer:
    return as_json([asdict(request) for request in hub.requests])


@routes("DELETE", "/_ctl/log")
def clear_log(hub: Hub, _call: Call) -> Answer:
    hub.clear_log()
    return as_json({})


@routes("GET", "/_ctl/errors")
def errors(hub: Hub, _call: Call) -> Answer:
    return as_json(list(hub.errors))


@routes("GET", "/_ctl/faults")
def faults(hub: Hub, _call: Call) -> Answer:
    return as_json([{**asdict(armed.fault), "hits": armed.hits, "seen": armed.seen} for armed in hub.faults.all()])


@routes("POST", "/_ctl/faults")
def add_fault(hub: Hub, call: Call) -> Answer:
    try:
        hub.fault(Fault(**call.json()))
    except (TypeError, ValueError) as error:
        raise Refusal(400, str(error)) from error
    return as_json({})


@routes("DELETE", "/_ctl/faults")
def clear_faults(hub: Hub, _call: Call) -> Answer:
    hub.clear_faults()
    return as_json({})


@routes("GET", "/_ctl/settings")
def settings(hub: Hub, _call: Call) -> Answer:
    return as_json({name: getattr(hub, name) for name in _SETTINGS})


@routes("POST", "/_ctl/settings")
def change_settings(hub: Hub, call: Call) -> Answer:
    """Changes those that are given, such as {"latency": 0.05}."""
    for name, value in call.json().items():
        if name not in _SETTINGS:
            raise Refusal(400, f"no such setting: {name}")
        setattr(hub, name, value)
    return settings(hub, call)


@routes("POST", "/_ctl/expire")
def expire(hub: Hub, _call: Call) -> Answer:
    hub.expire_urls()
    return as_json({})


@routes("POST", "/_ctl/user")
def user(hub: Hub, call: Call) -> Answer:
    """{"name", "token", "role"?, "orgs"?}."""
    hub.add_user(**call.json())
    return as_json({})


def _existing(hub: Hub, repo: str) -> str:
    if repo not in hub.repos:
        raise Refusal(404, f"no such repository: {repo}")
    return repo


@routes("POST", "/_ctl/private")
def private(hub: Hub, call: Call) -> Answer:
    """{"repo", "private"?}."""
    body = call.json()
    hub.set_private(_existing(hub, body["repo"]), body.get("private", True))
    return as_json({})


@routes("POST", "/_ctl/gate")
def gate(hub: Hub, call: Call) -> Answer:
    """{"repo", "gated"?}."""
    body = call.json()
    hub.gate(_existing(hub, body["repo"]), gated=body.get("gated", True))
    return as_json({})


@routes("POST", "/_ctl/grant")
def grant(hub: Hub, call: Call) -> Answer:
    """{"repo", "user"}."""
    body = call.json()
    hub.grant(_existing(hub, body["repo"]), body["user"])
    return as_json({})


@routes("GET", "/_ctl/commits")
def commits(hub: Hub, call: Call) -> Answer:
    """?repo=&revision=: commits newest first, each with its files' sizes."""
    found = hub.commits(_existing(hub, call.param("repo")), call.param("revision", "main"))
    return as_json(
        [
            {
                "sha": commit.sha,
                "parent": commit.parent,
                "title": commit.title,
                "message": commit.message,
                "date": commit.date,
                "files": {path: entry.size for path, entry in commit.tree.items()},
            }
            for commit in found
        ]
    )
