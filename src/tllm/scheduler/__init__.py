"""Which tokens to compute next, and in which blocks: requests in, steps out. Pure."""
