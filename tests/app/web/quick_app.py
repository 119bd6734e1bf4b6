"""An app without a page: it looks after the queue of a folder until it is killed."""

from __future__ import annotations

import sys
import time

from app.web.jobs import Jobs
from app.web.limits import Limits
from app.web.places import Workspace

if __name__ == "__main__":
    jobs = Jobs(Workspace(sys.argv[1]), Limits(), worker="tests.app.web.quick_worker")
    jobs.start()
    print("ready", flush=True)
    while True:
        time.sleep(1)
