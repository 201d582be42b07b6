"""Diffusers pipelines with what D-OPSD needs beyond the stock ones: contexts for student and teacher, velocities."""
