"""The command line ``meshrl``; a command is a file, registered in :mod:`meshrl.cli.app`."""

from meshrl.cli.app import app, main

__all__ = ["app", "main"]
