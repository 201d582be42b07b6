"""`--compile`: the transformer's repeated blocks, compiled by `torch.compile`."""

import functools
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
import torch.fx.experimental._config
from accelerate.logging import get_logger
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from .errors import InputError
from .loading import brief
from .sharding import repeated_blocks


logger = get_logger(__name__)

# A class of blocks has one graph per role, with and without gradients, for an input with and without gradients, and
# for one sample and several; and as many again for each choice of adapted layers and each dtype. Dynamo's limit of 8
# is below that. Far beyond it something else goes wrong, and compiling ends.
MAX_GRAPHS_PER_CLASS = 64

# A compiler's error holds its whole command.
MAX_ERROR_CHARACTERS = 300

# Warnings that need no action: torch makes a cache key of its own, and complex rotary embeddings stay uncompiled.
HARMLESS = (
    ".* does not implement _stable_hash_for_caching",
    "Torchinductor does not support code generation for complex operators",
)


class CompiledBlocks:
    """Compiles the blocks that a diffusers model repeats, one graph for all blocks of a class.

    Sizes are symbols in the graphs, so that their number does not depend on the number of buckets, prompt lengths and
    validation sizes. What a graph depends on is the block's class, the role and its adapter, whether gradients are
    recorded, and whether the batch holds one sample or more.

    `forward` of each block is compiled rather than its `__call__`, so hooks stay outside. If the compiler fails, the
    call that needed it and all later ones run as without it.

    Args:
        transformer: with its adapters; sharded, if it is to be.
        backend: what compiles a graph, for `torch.compile`.

    Attributes:
        num_graphs: compiled so far by this process.
        seconds: spent on them.
        is_stopped: whether the compiler failed.

    Raises:
        InputError: it has none.
    """

    def __init__(self, transformer: nn.Module, backend: str | Callable[..., Any] = "inductor"):
        self.blocks = repeated_blocks(transformer)
        if not self.blocks:
            raise InputError(f"--compile: {type(transformer).__name__} has no repeated blocks; drop the flag")
        self.compiler = torch._dynamo.lookup_backend(backend)
        self.num_graphs, self.seconds = 0, 0.0
        self.num_seen, self.num_reported = 0, 0  # after the last step, and in the last line of the log
        self.is_stopped = False
        for block in self.blocks:
            compiled = torch.compile(block.forward, fullgraph=True, dynamic=True, backend=self.compile_graph)
            block.forward = functools.partial(self.call, block, compiled)

    @property
    def num_classes(self) -> int:
        return len({type(block) for block in self.blocks})

    def compile_graph(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        with (
            # Together with the forward graph, so that no failure waits for a backward pass that is half done.
            torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
            # Dropout draws what it draws without the compiler.
            torch._inductor.config.patch(fallback_random=True),
            warnings.catch_warnings(),
        ):
            for message in HARMLESS:
                warnings.filterwarnings("ignore", message=message)
            compiled = self.compiler(graph, inputs)
        self.num_graphs += 1
        return compiled

    def call(self, block: nn.Module, compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The block's output, compiled if that is possible."""
        before, started = self.num_graphs, time.perf_counter()
        try:
            with compiler_settings():
                output = compiled(*args, **kwargs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            self.stop(error)
            return block.forward(*args, **kwargs)
        if self.num_graphs > before:
            self.seconds += time.perf_counter() - started
        return output

    def stop(self, error: Exception) -> None:
        """Runs all blocks without the compiler from now on."""
        self.is_stopped = True
        for block in self.blocks:
            del block.forward  # the instance's; the class's remains
        reason = brief(error, MAX_ERROR_CHARACTERS)
        logger.warning(
            f"--compile: the compiler failed ({reason}); the run goes on without it", main_process_only=False
        )

    def report(self) -> None:
        """Logs a new number of graphs. Called after each training step; waits for one that needs no further graph."""
        if self.num_graphs == self.num_seen and self.num_graphs > self.num_reported and not self.is_stopped:
            self.num_reported = self.num_graphs
            logger.info(
                f"Compiled {self.num_graphs} graphs for {self.num_classes} block classes in {self.seconds:.0f} seconds"
            )
        self.num_seen = self.num_graphs


def compiler_settings() -> ExitStack:
    """Settings of the compiler for one call; torch keeps them per thread, and a backward pass may have its own."""
    stack = ExitStack()
    # DDP's own splitting of graphs is for whole models.
    stack.enter_context(torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS_PER_CLASS, optimize_ddp=False))
    # Otherwise two sizes that happen to be equal are one symbol, and another graph follows when they are not.
    stack.enter_context(torch.fx.experimental._config.patch(use_duck_shape=False))
    return stack
