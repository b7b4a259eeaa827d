"""What CAPE is compared with: NTK linearizations, learned static features, and warm-up curve extrapolation."""
