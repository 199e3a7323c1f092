"""The eigenpairs that a vector can reach: dense or Lanczos, and which is cheaper."""
