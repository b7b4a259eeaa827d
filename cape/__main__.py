"""``python -m cape``: the command line."""

from cape.cli import main

raise SystemExit(main())
