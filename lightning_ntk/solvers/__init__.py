"""The eigenpairs that a vector can reach: dense or Lanczos, which is cheaper, and what rounding does to them."""
