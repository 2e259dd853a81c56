"""One module for each question that is answered by measurement."""
