"""What methods of personalisation are measured on: 30 subjects with their photos, and 25 prompts for each."""
