"""Diffusers pipelines with the methods that D-OPSD adds to the stock ones: encoded contexts and velocities."""
