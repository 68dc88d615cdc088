"""`interp-steer verify`: the toolkit's contract, checked on a model of the user's own."""

import math

import typer

from interp_steer.cli import common
from interp_steer.util.console import progress


def verify(
    model: common.Model = "starter",
    as_json: common.Json = False,
    dtype: common.Dtype = None,
    device: common.Device = None,
) -> None:
    """Check that the toolkit computes your own model correctly.

    Each check compares two ways to the same number. The exit code is 1 if one fails.
    """
    loaded = common.load(model, dtype, device)
    from interp_steer.engine.verify import CHECKS
    from interp_steer.engine.verify import verify as run

    with progress("checking", len(CHECKS)) as report:
        checks = run(loaded, report)
    passed = all(check.passed for check in checks)
    if as_json:
        records = [
            {
                "name": check.name,
                "passed": check.passed,
                "difference": check.difference if math.isfinite(check.difference) else None,
                "tolerance": check.tolerance,
            }
            for check in checks
        ]
        common.print_json({"model": model, "passed": passed, "checks": records})
    else:
        print(loaded)
        for check in checks:
            word = "ok  " if check.passed else "FAIL"
            print(f"{word} {check.name}: {check.difference:.2g} (at most {check.tolerance:.2g})")
    raise typer.Exit(0 if passed else 1)
