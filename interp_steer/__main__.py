"""`python -m interp_steer`, the same as `interp-steer`."""

from interp_steer.cli import main

main()
