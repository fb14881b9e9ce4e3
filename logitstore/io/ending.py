"""Whether the program ends: whoever waits for a server in a thread stops then.

An interpreter waits for threads of `concurrent.futures` before anything could tell them to stop, so that reads under
way have daemon threads, and are told here.
"""

from __future__ import annotations

import atexit
import threading

ending = threading.Event()
atexit.register(ending.set)
