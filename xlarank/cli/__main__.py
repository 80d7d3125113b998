"""`python -m xlarank.cli`."""

from xlarank.cli.main import run

if __name__ == "__main__":
    run()
