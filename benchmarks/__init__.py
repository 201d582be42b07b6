"""Measurements of the method."""
