"""Entry point of a fit for ``ray job submit``: ``python ray_jobs/fit.py META_DIR --out MODEL_DIR [...]``.

The arguments are those of ``cape fit``. It runs on the cluster that runs the job.
"""

from __future__ import annotations

import sys

from cape.cli import main

if __name__ == "__main__":
    sys.exit(main(["fit", "--address", "auto", *sys.argv[1:]]))
