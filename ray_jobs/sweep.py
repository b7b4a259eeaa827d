"""Entry point of a sweep for ``ray job submit`` and KubeRay: ``python ray_jobs/sweep.py SPEC --out DIR [...]``.

The arguments are those of ``cape sweep``. It runs on the cluster that runs the job and always resumes, so that a job
that is started again (by hand, or by KubeRay after a failure) goes on where the files end.
"""

from __future__ import annotations

import sys

from cape.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", "--address", "auto", "--resume", *sys.argv[1:]]))
