"""Procedurally generated images."""
