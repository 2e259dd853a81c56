"""Planning of runs on machines that are not at hand: memory, time and traffic, from the compiled programs."""
