"""What a personalised model is worth: sampled prompts, metrics, gallery and report."""
