"""``python -m addlang``."""

from addlang.cli import main

main()
