"""`make demo`: Label Studio, backend and core on this machine, with a project that shows what the product does."""
