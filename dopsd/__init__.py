"""On-policy self-distillation (D-OPSD, arXiv 2605.05204) and all of training that does not depend on the model."""

import logging


# diffusers imports bitsandbytes, which on some CPUs warns that it does not find a kernel for 4-bit matrix products: it
# looks like an error, and nothing here needs the kernel. The filter stands here because it must precede that import.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")
)
