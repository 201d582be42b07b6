"""A miniature FLUX.2-klein that is trained, tuned and evaluated on a CPU, in a world drawn by code. See README.md."""
