"""``python -m sparseattn.cli``."""

from sparseattn.cli import main

main()
