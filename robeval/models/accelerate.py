"""Ways to run the same network faster on some machines. Measure before using them: benchmarks/options.py."""

from __future__ import annotations

import torch
from torch import nn

from robeval.core.classifier import Classifier


def accelerate(classifier: Classifier, *, channels_last: bool = False, compiled: bool = False) -> None:
    """Change how a classifier runs, not what it computes beyond rounding; its facts say so.

    Args:
        classifier: Changed in place. A plain callable, not a module, is left as it is.
        channels_last: Keep the weights of convolutions in channels-last layout.
        compiled: Compile with torch.compile. Every new batch width is compiled once.
    """
    if not isinstance(classifier.module, nn.Module):
        return
    if channels_last:
        classifier.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        classifier.info["channels_last"] = True
    if compiled:
        # One graph per width: a padded batch has one of at most sixteen.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        classifier.module = torch.compile(classifier.module, dynamic=False)
        classifier.info["compiled"] = True
