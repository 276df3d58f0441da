"""`python -m nnsight`: the command line."""

from nnsight.cli import app

if __name__ == "__main__":
    app(prog_name="nnsight")
