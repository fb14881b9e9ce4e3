"""The Hugging Face Hub: publishing datasets, fetching them, and their cards.

Reading one where it is needs nothing of this: `logitstore.open("hf://datasets/ns/name")`.
"""

from logitstore.hub.pull import Pulled, pull
from logitstore.hub.push import Pushed, push
from logitstore.hub.repair import NotRepaired, Repaired, repair
from logitstore.hub.sink import HubSink

__all__ = ["HubSink", "NotRepaired", "Pulled", "Pushed", "Repaired", "pull", "push", "repair"]
