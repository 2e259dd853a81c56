"""The benchmarks of personalisation: 30 subjects with photos, and 25 prompts for each."""
