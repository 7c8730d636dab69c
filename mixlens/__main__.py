"""`python -m mixlens`, where the command itself is not on the path."""

from mixlens.cli.main import script

if __name__ == "__main__":
    script()
