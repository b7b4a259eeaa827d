"""One script per claim that the README makes; variants interleaved in one run, JSON out."""
