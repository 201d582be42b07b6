"""Training data, from files to the order in which they are trained on.

1. Sources: `sources.read_pictures` lists pictures and captions, from a folder (`folder`, `metadata`) or a data set
   (`dataset`), without decoding them.
2. Decoding: `checking.check_pictures` decodes every picture once, to find bad files before training starts.
3. Buckets: `buckets.plan_examples` chooses the size and the crop of every example.
4. Order: `order.SampleOrder` and `order.micro_batches` say which examples each optimizer step trains on.

`training_data.load_training_data` does all of this. Modules import one way, from later stages to earlier ones. All
random choices derive from `--seed` and their place in the run.
"""
