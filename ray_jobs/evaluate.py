"""Entry point of an evaluation for ``ray job submit``: ``python ray_jobs/evaluate.py META_DIR --out REPORT_DIR [...]``.

The arguments are those of ``cape evaluate``.
"""

from __future__ import annotations

import sys

from cape.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
