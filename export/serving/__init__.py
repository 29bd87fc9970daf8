"""Write what other servers need: a Triton model repository, a KServe manifest."""
