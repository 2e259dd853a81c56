"""What `experiments.benchmark_peers` measures: the cases, our steps, and those of diffusers."""
