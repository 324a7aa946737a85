"""The numba backend: ``backend`` is what the dispatch rule sees, ``rows`` the readable kernels, the others the fast ones."""
