"""What can be learned at initialization from one batch: per-sample gradient norms and the features built on them."""

from cape.probing.features import Features, probe
from cape.probing.per_sample import all_norms, per_sample_norms
from cape.probing.wanted import Norms

__all__ = ["Features", "Norms", "all_norms", "per_sample_norms", "probe"]
