"""What a run would take of a machine that is not at hand: memory, time and traffic, from the compiled programs."""
