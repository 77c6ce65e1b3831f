"""`python scripts/render_server.py ...`: see rendering/server.py."""

import sys

from rendering.server import main

if __name__ == "__main__":
    sys.exit(main())
