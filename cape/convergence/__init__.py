"""T*: how many optimizer updates until the loss of the probe batch falls to ε·L_0 (Eq. 3)."""

from cape.convergence.single import Trajectory, measure
from cape.convergence.stopping import TrajectoryScan

__all__ = ["Trajectory", "TrajectoryScan", "measure"]
