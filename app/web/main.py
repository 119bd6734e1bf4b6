"""The app as a process: its folder, its queue of runs, its page. What needs torch is loaded when it is first asked for.

    lora-diffusion app

On a Hugging Face Space this file is what is started.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a file: let `app` be found beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from app.web.context import Context
from app.web.libraries import load_libraries
from app.web.limits import MIB, where
from app.web.page import build
from app.web.places import Workspace
from app.web.theme import CSS, theme
from app.web_config import AppConfig

_LOCAL = ("127.0.0.1", "localhost", "::1")


def make(config: AppConfig) -> tuple[Context, Any]:
    """The app and its page, not yet served."""
    place = where(shared=config.share or config.host not in _LOCAL)
    context = Context(Workspace(config.root), place, model=config.model, text_model=config.text_model)
    page = build(context)
    page.queue(max_size=64, default_concurrency_limit=4)
    return context, page


def launch_options(context: Context, config: AppConfig) -> dict[str, Any]:
    """What `page.launch` is given: no folder of the app is served, nothing is told to anybody."""
    most = max(context.limits.image_bytes, context.limits.adapter_bytes, context.limits.text_bytes)
    return {
        "server_name": config.host, "share": config.share, "inbrowser": config.open, "theme": theme(), "css": CSS,
        "allowed_paths": [], "blocked_paths": [str(context.workspace.root)], "max_file_size": f"{most // MIB}mb",
        "show_error": False, "strict_cors": True, "enable_monitoring": False, "run_history": False, "quiet": True,
        "footer_links": ["api", "settings"], "prevent_thread_lock": True, "ssr_mode": False,
        "state_session_capacity": 1000,
    }  # fmt: skip


def serve(config: AppConfig, *, debug: bool = False) -> int:
    """Serve until Ctrl-C; returns the exit code. Runs go on afterwards, and are found again by the next start."""
    context, page = make(config)
    context.jobs.start()
    try:
        _, address, public = page.launch(server_port=_free_port(config), **launch_options(context, config))
        print(
            f"the page is at {public or address}  (its files are in {context.workspace.root}; Ctrl-C ends it)",
            flush=True,
        )
        threading.Thread(target=_warm_up, name="warm-up", daemon=True).start()
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print("stopped; a training that runs goes on, and shows again at the next start")
        return 0
    finally:
        context.jobs.close()
        page.close(verbose=False)


def _warm_up() -> None:
    """Load the large libraries while the page is being looked at; without it, the first to ask waits for them."""
    time.sleep(2.0)
    load_libraries()


def _free_port(config: AppConfig) -> int:
    """The port asked for, or the next that is free."""
    import socket

    for port in range(config.port, min(config.port + 50, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((config.host, port))
                return port
            except OSError:
                continue
    return config.port


if __name__ == "__main__":
    kept = Path("/data")  # a Space's disk, if it has one that outlasts it
    place = str(kept / "lora-diffusion") if kept.is_dir() and os.access(kept, os.W_OK) else "lora-diffusion-app"
    sys.exit(serve(AppConfig(host="0.0.0.0", root=place)))
