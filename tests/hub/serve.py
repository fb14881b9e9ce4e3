"""Runs a Hub in a process of its own: PYTHONPATH=tests python -m hub.serve.

Prints one line of JSON, {"endpoint": ..., "storage": ...}, and serves until its standard input ends. The control API
at {endpoint}/_ctl/ gives what the object gives.
"""

from __future__ import annotations

import argparse
import json
import sys

from hub.server import Hub


def main() -> None:
    parser = argparse.ArgumentParser(prog="hub.serve", description="A stand-in of the Hugging Face Hub, for tests.")
    parser.add_argument("--latency-ms", type=float, default=0.0, help="delay of every answer")
    parser.add_argument("--bytes-per-second", type=float, help="speed of a connection to the storage")
    parser.add_argument("--token", default="hf_test_me", help='token of the user "me"')
    args = parser.parse_args()
    with Hub(token=args.token, latency=args.latency_ms / 1000, bytes_per_second=args.bytes_per_second) as hub:
        sys.stdout.write(json.dumps({"endpoint": hub.endpoint, "storage": hub.storage}) + "\n")
        sys.stdout.flush()
        while sys.stdin.buffer.read(1 << 16):
            pass


if __name__ == "__main__":
    main()
