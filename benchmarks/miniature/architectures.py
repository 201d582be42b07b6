"""The models of which there is a miniature."""

from pathlib import Path

from diffusers import DiffusionPipeline

from benchmarks.miniature.architecture import Architecture, Context
from benchmarks.miniature.klein import KLEIN
from benchmarks.miniature.zimage import ZIMAGE
from pipelines.z_image import ZImageContext, ZImageDOPSDPipeline


ARCHITECTURES = {architecture.name: architecture for architecture in (KLEIN, ZIMAGE)}


def architecture_of(part: DiffusionPipeline | Context) -> Architecture:
    """Of a pipeline that `Architecture.load` returns, or of one of its contexts."""
    return ZIMAGE if isinstance(part, ZImageDOPSDPipeline | ZImageContext) else KLEIN


def architecture_in(folder: Path) -> Architecture:
    """Of the pipeline in a folder."""
    name = DiffusionPipeline.load_config(folder)["_class_name"]
    return next(item for item in ARCHITECTURES.values() if item.stock_pipeline_class.__name__ == name)
