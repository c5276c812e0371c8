"""``python -m robeval`` is the command ``robeval``."""

from robeval.cli.app import main

if __name__ == "__main__":
    main()
