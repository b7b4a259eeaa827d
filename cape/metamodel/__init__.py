"""The meta-regressor: from a row's probe features to log T*, with intervals, p_reach and a domain check.

``fit.fit`` makes one from a meta-dataset through Ray Train, ``artifact.MetaModel`` is what it makes.
"""
