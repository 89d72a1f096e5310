# SPDX-License-Identifier: Apache-2.0
"""How other services use Tandem: examples/python streams tandem.v1.Inference/Generate over ZeroMQ with the same .proto files."""
import pathlib, sys
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tools"))
from tandem_e2e import *

try:
    import zmq, google.protobuf  # noqa: F401
except ImportError as e:
    skip(f"{e.name} is missing (python3-zmq, python3-protobuf)")

EXAMPLE = ROOT / "examples/python/tandem_client.py"


def example(endpoint, *args, expect=0):
    r = subprocess.run([sys.executable, "-B", str(EXAMPLE), "--endpoint", endpoint, *args], capture_output=True, text=True, timeout=60 * SLOW)
    check(r.returncode == expect, (args, r.returncode, r.stdout, r.stderr))
    return r


def main_test():
    with tempfile.TemporaryDirectory() as tmp:
        endpoint = f"ipc://{tmp}/rpc.sock"
        with Server("--rpc-listen", endpoint) as s:
            http = s.chat("What is 23 + 48?", temperature=0)["choices"][0]["message"]
            r = example(endpoint, "What is 23 + 48?", "--temperature", "0")
            check(http["content"].strip() in r.stdout, (http, r.stdout))
            check(s.json("GET", "/health")["status"] == "ok", "still serving")


if __name__ == "__main__":
    main(main_test)
