"""CAPE: predict how many optimizer steps a network needs, from one mini-batch at initialization."""

__version__ = "0.1.0"
