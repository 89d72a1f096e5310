# SPDX-License-Identifier: Apache-2.0
"""Run a command with TD_URL pointing at a server."""
import pathlib, sys
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tools"))
from tandem_e2e import *

with Server() as srv:
    r = subprocess.run(sys.argv[1:], env={**os.environ, "TD_URL": f"http://{srv.host}:{srv.port}"})
    check(r.returncode == 0, f"{sys.argv[1:]} ended with {r.returncode}")
