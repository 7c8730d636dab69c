"""Entry point of ``python -m mixlens``."""

from mixlens.cli.main import script

if __name__ == "__main__":
    script()
