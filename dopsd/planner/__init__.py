"""What a run will take: bytes by phase, floating point operations, time, disk; computed without loading a weight."""
