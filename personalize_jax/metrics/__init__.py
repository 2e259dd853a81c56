"""How true to the subject, how true to the prompt, how varied."""
