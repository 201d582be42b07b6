"""On-policy self-distillation (D-OPSD, arXiv 2605.05204) and all of training that does not depend on the model."""

import logging


# diffusers imports packages that warn of what looks like an error, and nothing here needs what they lack: a kernel for
# 4-bit matrix products on some CPUs, kernels for other formats, classes of torchao's older versions. The filters stand
# here because they must precede those imports.
HARMLESS = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "torchao": "Failed to load ",
    "torch.utils._pytree": "<enum ",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
}
for name, beginning in HARMLESS.items():
    logging.getLogger(name).addFilter(
        lambda record, beginning=beginning: not record.getMessage().startswith(beginning)
    )
