"""`python -m experiments`."""

import sys

from experiments.cli import interrupt

if __name__ == "__main__":
    interrupt.install()
    try:
        from experiments.cli.app import main
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("experiments", "wn_jax"):
            raise
        sys.exit(f"The experiments need {error.name!r}, which is not installed: pip install -e '.[experiments]'")
    main()
