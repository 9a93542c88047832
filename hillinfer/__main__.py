"""`python -m hillinfer`."""

from hillinfer.commands.app import main

main()
