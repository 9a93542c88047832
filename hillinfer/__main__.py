"""`python -m hillinfer`."""

from hillinfer.cli import main

main()
