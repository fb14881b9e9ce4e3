"""A stand-in of the Hugging Face Hub for tests: loopback only, standard library only, LFS storage and no Xet.

with Hub() as hub:
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    hub.fault(Fault(kind="lost-reply", method="POST", path="/commit/"))
    ...
    assert not [r for r in hub.requests if r.origin == "storage" and r.authorization]
    assert hub.errors == []
"""

from hub.faults import Fault
from hub.journal import Request
from hub.server import Hub

__all__ = ["Fault", "Hub", "Request"]
