"""`python scripts/render_server.py ...`: see rendering/server.py."""

import sys

from run.options import need, run_main


def serve() -> int:
    """Start the server, if Ray is there."""
    need("ray", "scripts/render_server.py")
    from rendering.server import main

    return main()


if __name__ == "__main__":
    sys.exit(run_main("render_server", serve))
