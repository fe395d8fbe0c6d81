"""``python -m compile_modes``, which is what the script ``compile-modes`` runs."""

import sys

from compile_modes.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
