"""The models of which there is a miniature."""

from diffusers import DiffusionPipeline

from benchmarks.miniature.architecture import Architecture
from benchmarks.miniature.klein import KLEIN
from benchmarks.miniature.zimage import ZIMAGE
from pipelines.z_image import ZImageDOPSDPipeline


ARCHITECTURES = {"klein": KLEIN, "zimage": ZIMAGE}


def architecture_of(pipeline: DiffusionPipeline) -> Architecture:
    return ZIMAGE if isinstance(pipeline, ZImageDOPSDPipeline) else KLEIN
