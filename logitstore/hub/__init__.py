"""The Hugging Face Hub: publishing datasets, fetching them, and their cards.

Reading one where it is needs nothing of this: `logitstore.open("hf://datasets/ns/name")`.
"""

from logitstore.hub.pull import Pulled, pull
from logitstore.hub.push import Pushed, push

__all__ = ["Pulled", "Pushed", "pull", "push"]
