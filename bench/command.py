"""What the commands about training steps share: options, check, tables, JSON."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from bench import cases, record
from bench.check import CheckFailed, check
from bench.record import progress


def run(
    args: argparse.Namespace,
    argv: Sequence[str],
    measure_case: Callable[[cases.Case, argparse.Namespace], dict],
    table: Callable[[dict], str],
) -> int:
    """Check all cases, then measure one after the other; print their tables and write the JSON file.

    Args:
        args: the options of `cases.add_arguments`.
        argv: the command line as it was given.
        measure_case: the figures of a case.
        table: makes Markdown of them.

    Returns:
        The exit code: 1 if a check failed, and 2 if what was asked for cannot be done; then nothing is
        measured, printed or written.
    """
    try:
        chosen = cases.from_arguments(args)
    except ValueError as error:
        progress(str(error))
        return 2
    checks = {}
    for case in chosen:
        progress(f"{case.name}: checking ours against the published rule")
        try:
            checks[case.name] = check(case, args.sites, args.device, args.precision)
        except CheckFailed as error:
            print(f"the check failed, so nothing was measured: {error}", file=sys.stderr)
            return 1
    head = record.header(argv, args.device, args.precision)
    print(record.machine_line(head))
    results = []
    for case in chosen:
        differences = ", ".join(f"{max(d.values()):.1g} in {kind}" for kind, d in checks[case.name].items())
        result = {"case": case.describe(), "sizes": case.sizes(), "differences": checks[case.name]}
        result |= measure_case(case, args)
        results.append(result)
        print(f"\n## {case.describe()}, {args.precision} on {args.device}\n\n{table(result)}\n")
        print(
            f"Checked: loss, weights and R as by the published rule, relative differences {differences}.",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(head | {"results": results}, indent=1) + "\n")
    return 0
