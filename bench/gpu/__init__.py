"""`python -m bench gpu`: tests, accuracy and speed on a GPU in minutes, or a rehearsal of it on a CPU."""
