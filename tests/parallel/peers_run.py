"""Two processes that do nothing together, or until one of them fails.

python peers_run.py PORT PROCESS_ID SECONDS_UNTIL_IT_FAILS
"""

import sys
import time

import jax

from nuwa_jax.errors import UserError
from nuwa_jax.parallel.distributed import Launch, job

if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    port, process_id, seconds = sys.argv[1:]
    launch = Launch(f"localhost:{port}", 2, int(process_id), peer_timeout=5)
    with job(launch) as process:
        print(f"process {process} has come", flush=True)
        time.sleep(float(seconds))
        raise UserError("my disk is full")
