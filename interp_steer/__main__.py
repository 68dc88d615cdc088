"""`python -m interp_steer`, the same as `interp-steer`."""

from interp_steer.cli.main import main

main()
