"""Seeded faults: damaged input that a run either trains on, or refuses with one line.

    python -m tests.faults --count 400 --seed 0

Each kind of fault is a function that damages copies of good input, chosen by a random generator, and says what the run
may do with it. A case is repeated exactly by its seed and number.
"""
