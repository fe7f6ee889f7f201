"""`python -m bench gpu`: what a machine with a GPU can prove in minutes, or a rehearsal of it on a CPU."""
