"""Comparing LoRAs of any trainer: the same prompts and seeds, drawn with stock diffusers and measured."""
