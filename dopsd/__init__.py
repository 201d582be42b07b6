"""On-policy self-distillation (D-OPSD, arXiv 2605.05204) and all of training that does not depend on the model."""
