"""The language-neutral contract of meshrl and the programs that write it; not part of the package."""
