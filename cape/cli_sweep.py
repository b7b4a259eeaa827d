"""The commands of ``cape.cli`` around a sweep: ``sweep``, ``store``, and the Ray jobs."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cape.config import check_count
from cape.errors import DataError, SpecError, StoreError

if TYPE_CHECKING:
    from cape.store.location import Location
    from cape.store.verify import Verification


def sweep(args: argparse.Namespace) -> None:
    """``cape sweep SPEC.json|PRESET --out DIR``, ``cape sweep SPEC --dry-run``, ``cape sweep status DIR``."""
    from cape import datasets
    from cape.sweep.plan import read_spec

    if args.spec == "status":
        from cape.sweep.summary import status as sweep_status

        if args.folder is None:
            raise SpecError("`cape sweep status` needs the directory of a sweep: cape sweep status DIR.")
        print(sweep_status(args.folder))
        return
    if args.folder is not None:
        raise SpecError(f"'{args.folder}' is one argument too many; `cape sweep --help` lists them.")
    spec = read_spec(args.spec, datasets.data_root(args.data_root))
    if args.dry_run:
        from cape.store.location import Location
        from cape.sweep.estimate import estimate
        from cape.sweep.job import check

        if args.workers is not None:
            check_count(args.workers, "--workers")
        try:
            check(spec, args.data_root, args.imports, download=False)
        except DataError as error:  # a plan can be made where the data is not
            print(f"cape: the data could not be checked: {error}", file=sys.stderr)
        where = None if args.out is None else Location.of(args.out)
        print(estimate(spec, where, args.workers or 1))
        return
    if args.out is None:
        raise SpecError("A sweep needs a directory to write to: --out DIR.")
    options: dict[str, Any] = {
        "resume": args.resume,
        "data_root": args.data_root,
        "progress": not args.quiet,
        "imports": tuple(args.imports),
    }
    for name in ("trial_seconds", "chunk_seconds"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    if args.inline:
        from cape.sweep.inline import run_inline

        result = run_inline(spec, args.out, **options)
    else:
        from cape.sweep.driver import run_sweep

        options |= {"address": args.address, "workers": args.workers, "gpus_per_worker": args.gpus_per_worker}
        result = run_sweep(spec, args.out, **options)
    if not args.quiet:
        from cape.sweep.summary import summary

        print(summary(args.out), file=sys.stderr)
    print(result)


def store(args: argparse.Namespace) -> None:
    """``cape store verify|compact|retry|path|reprobe DIR``."""
    if not 0.0 <= args.keep_seconds < math.inf:
        raise SpecError(f"--keep-seconds must be zero or more, not {args.keep_seconds}.")
    if args.action == "path":
        from cape.store.reader import rows_path

        print(rows_path(args.meta_dir))
    elif args.action == "verify":
        from cape.store import reader
        from cape.store.location import Location
        from cape.store.verify import verify
        from cape.sweep.plan import Plan

        where = Location.of(args.meta_dir)  # prints no credentials
        if not reader.read_specs(where) and not reader.list_chunks(where):
            raise StoreError(f"{where} holds no meta-dataset; name the folder that a sweep wrote.")
        found = verify(where, lambda spec: Plan(spec).all_ids(), set_aside=args.set_aside)
        print(found)
        if not found.sound:
            raise StoreError(f"{where} is not sound. {' '.join(_mended(found, where, args.set_aside))}")
    elif args.action == "reprobe":
        from cape.sweep.reprobe import reprobe

        print(
            reprobe(
                args.meta_dir,
                data_root=args.data_root,
                workers=args.workers,
                imports=tuple(args.imports),
                keep_seconds=args.keep_seconds,
            )
        )
    elif args.action == "retry":
        from cape.store.retry import retry

        print(retry(args.meta_dir, keep_seconds=args.keep_seconds))
    else:
        from cape.store.compact import compact

        if not 0.0 < args.target_mb < math.inf:
            raise SpecError(f"--target-mb must be more than zero, not {args.target_mb}.")
        size = int(args.target_mb * 2**20)
        print(compact(args.meta_dir, out=args.out, target_bytes=size, keep_seconds=args.keep_seconds))


def _mended(found: Verification, where: Location, set_aside: bool) -> Iterator[str]:
    """Yield what mends each kind of fault that was found."""
    if found.unreadable or found.foreign:
        done = "They were set aside" if set_aside else "Add --set-aside to move unreadable and foreign files"
        yield f"{done}; a resume then runs their trials again."
    if found.duplicates:
        elsewhere = " --out FOLDER" if where.folder is None else ""
        yield f"`cape store compact {where}{elsewhere}` leaves every row once."
    if found.incomplete or found.unplanned:
        yield "No command mends incomplete trials or trials outside the plan; sweep into another folder."


def submit(args: argparse.Namespace) -> None:
    """``cape submit sweep SPEC --out DIR --address http://head:8265``."""
    from cape.sweep.submit import default_address
    from cape.sweep.submit import submit as submit_job

    # Our own options may also stand behind the command: what they do not know goes to the job as it is.
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--address", default=args.address)
    own.add_argument("--installed", action="store_true", default=args.installed)
    own.add_argument("--no-follow", action="store_true", default=args.no_follow)
    ours, arguments = own.parse_known_args(args.arguments)
    address = ours.address or default_address()
    submit_job(args.job, arguments, address, args.parse, ship=not ours.installed, follow=not ours.no_follow)


def status(args: argparse.Namespace) -> None:
    """``cape status [ID]``: CAPE's jobs on a cluster."""
    from cape.sweep.submit import default_address
    from cape.sweep.submit import status as job_status

    for job_id, state, message in job_status(args.address or default_address(), args.id):
        print(f"{job_id}  {state:<10} {message}")


def stop(args: argparse.Namespace) -> None:
    """``cape stop ID``."""
    from cape.sweep.submit import default_address
    from cape.sweep.submit import stop as stop_job

    print(f"{args.id}  {stop_job(args.address or default_address(), args.id)}")
