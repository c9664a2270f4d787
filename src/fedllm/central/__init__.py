"""Central fine-tuning through TRL and accelerate: the upper bound of a federation."""
